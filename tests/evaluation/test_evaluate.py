"""`mk.evaluate`: what every row was answered, and that it is what the model says to each prompt alone."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.evaluation import bootstrap_interval, paired_bootstrap, wilson_interval
from mmicl_kernels.evaluation.generation import GENERATIONS, Generation, YesNo
from mmicl_kernels.evaluation.metrics import auroc, exact_match, postprocess
from mmicl_kernels.training import EpisodeCollator
from tests.support.example_images import png
from tests.support.questions import (
    NEW_TOKENS,
    PROCESSORS,
    adapter_of,
    decoded,
    model_and_processor,
    plain_state,
    rows_of,
    said,
    write,
)

WHOLE = Generation(max_new_tokens=NEW_TOKENS, cut="none")


@pytest.fixture
def world(tmp_path):
    """Model, processor, files of queries and of demonstrations."""
    model, processor = model_and_processor()
    queries = write(tmp_path, "query", rows_of("q", 6))
    pool = write(tmp_path, "pool", rows_of("p", 5))
    return model, processor, queries, pool


def drawn(builder, pool, query, shots, seed=0):
    """As training draws them."""
    collate = EpisodeCollator(builder, pool, shots, seed=seed)
    return [x.demonstration() for x in collate.drawn(query)]


def test_every_row_is_what_each_prompt_alone_is_answered(world):
    model, processor, queries, pool = world
    live, aim = adapter_of(model, mk.LIVEConfig()), adapter_of(model, mk.AIMConfig())
    learned = adapter_of(model, mk.PromptTuningConfig())
    stave = adapter_of(model, mk.STAVEConfig(readout=2))
    adapters = {"live": live, "aim": aim, "learned": learned, "stave": stave}
    made = mk.evaluate(
        model, processor, queries, adapters=adapters, shots=(0, 2, 3), seed=5,
        adapter_shots=(0, 2), demonstrations=pool, generation=WHOLE, batch_size=4, progress=False,
    )  # fmt: skip
    builder, records, examples = mk.PromptBuilder(processor), mk.Records(queries), mk.Records(pool)
    rows = ["zero-shot", "2-shot", "3-shot", "live", "live, 2-shot", "aim, 2 fused", "aim, 3 fused"]
    rows += ["learned", "learned, 2-shot", "stave", "stave, 2-shot"]
    expected = {name: [] for name in rows if name != "aim, 3 fused"}
    for record in records:
        query = record.demonstration()
        shots = {k: drawn(builder, examples, record, k, seed=5) for k in (2, 3)}
        assert shots[3][:2] == shots[2]
        expected["zero-shot"].append(said(model, builder, query))
        expected["2-shot"].append(said(model, builder, query, shots[2]))
        expected["3-shot"].append(said(model, builder, query, shots[3]))
        with mk.attach(model, live):
            expected["live"].append(said(model, builder, query))
            expected["live, 2-shot"].append(said(model, builder, query, shots[2]))
        with mk.attach(model, aim) as handle:
            prompt, tokens = builder.prompt([query]), handle.aggregate(*builder.demonstrations(shots[2]))
            embedded = fused(tokens)
            inputs = handle.splice(prompt, [[0, 1]], tokens=embedded)
            expected["aim, 2 fused"].append(decoded(model, builder, inputs))
        with mk.attach(model, learned) as handle:
            for name, before in (("learned", []), ("learned, 2-shot", shots[2])):
                inputs = handle.splice(builder.prompt([query], [before]))
                expected[name].append(decoded(model, builder, inputs))
        with mk.attach(model, stave) as handle:
            expected["stave"].append(said(model, builder, query))
            with handle.tokens(common_end(builder.prompt([query]), builder.prompt([query], [shots[2]]))):
                expected["stave, 2-shot"].append(said(model, builder, query, shots[2]))
    for name, texts in expected.items():
        assert made[name].texts == tuple(x.strip() for x in texts), name
    assert [row.name for row in made.rows] == rows
    assert len(set(map(tuple, expected.values()))) == len(expected)  # else a row may be another's
    assert made.best == "2-shot"  # the first of equals


def common_end(alone, shown):
    """Which tokens of a prompt with demonstrations are the query's."""
    ids, count = shown["input_ids"], 0
    while alone["input_ids"][0, -1 - count] == ids[0, -1 - count]:
        count += 1
    return torch.arange(ids.shape[1])[None] >= ids.shape[1] - count


def fused(tokens):
    from mmicl_kernels.methods.sites import FusedTokens

    lengths = torch.tensor([0, *(len(x) for x in tokens)])
    return FusedTokens(torch.cat(tokens), lengths.cumsum(0), None)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_batch_size_does_not_matter(name, chat, tmp_path):
    """Prompts of different lengths and numbers of images, padded on the left."""
    if name == "idefics" and chat:
        pytest.skip("the first Idefics has no chat template")
    model, processor = model_and_processor(name, chat)
    queries = [*rows_of("q", 3), *rows_of("two", 2, images=2)]
    queries, pool = write(tmp_path, "query", queries), write(tmp_path, "pool", rows_of("p", 4))
    options = {"shots": (0, 2), "demonstrations": pool, "progress": False}
    configs = {"live": mk.LIVEConfig(), "learned": mk.PromptTuningConfig()}
    adapters = {adapter: adapter_of(model, config) for adapter, config in configs.items()}
    options |= {"generation": WHOLE, "adapters": adapters}
    one, four = (mk.evaluate(model, processor, queries, batch_size=n, **options) for n in (1, 4))
    for row, other in zip(one.rows, four.rows, strict=True):
        assert row.texts == other.texts
        assert (row.prompt_tokens, row.image_tokens) == (other.prompt_tokens, other.image_tokens)
        assert len(set(row.texts)) > 1
    builder = mk.PromptBuilder(processor, "chat" if chat else "{image}{text} {answer}")
    lengths = [builder.prompt([x.demonstration()])["input_ids"].shape[1] for x in mk.Records(queries)]
    assert len(set(lengths)) > 2
    assert one["zero-shot"].prompt_tokens == pytest.approx(np.mean(lengths))


def test_scores_and_differences(world, tmp_path):
    """Right is what the model says after two demonstrations, half of it also what it says to nothing."""
    model, processor, queries, pool = world
    builder, records, examples = mk.PromptBuilder(processor), mk.Records(queries), mk.Records(pool)
    rows = rows_of("q", 6)
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        shots = drawn(builder, examples, record, 2)
        row["answers"] = [said(model, builder, record.demonstration(), shots)]
        if i < 2:
            row["answers"].append(said(model, builder, record.demonstration()))
    write(tmp_path, "query", rows)
    live = adapter_of(model, mk.LIVEConfig())
    options = {"shots": (0, 1, 2), "demonstrations": pool, "generation": WHOLE, "progress": False}
    made = mk.evaluate(model, processor, queries, adapters={"live": live}, **options)
    right = {name: made[name].score.samples for name in ("zero-shot", "2-shot", "live")}
    assert right["zero-shot"].tolist() == [1, 1, 0, 0, 0, 0] and right["2-shot"].tolist() == [1] * 6
    for row in made.rows:
        score = exact_match(row.texts, [x["answers"] for x in rows])
        assert row.score.value == score.value and (row.score.samples == score.samples).all()
    low, high = wilson_interval(2, 6)  # all samples are 0 or 1
    assert (made["zero-shot"].interval.low, made["zero-shot"].interval.high) == (low, high)
    assert made.best == "2-shot" and made["2-shot"].minus_best is None
    assert made["2-shot"].minus_zero_shot == paired_bootstrap(right["2-shot"], right["zero-shot"])
    assert made["live"].minus_best == paired_bootstrap(right["live"], right["2-shot"])
    assert made.gap.exists and made.gap.difference.value == pytest.approx(4 / 6)
    assert "2-shot, the best of 2: a gap to close: demonstrations add 0.6667" in str(made)
    options["shots"] = (0, 1)
    assert "1-shot: no gap to close" in str(mk.evaluate(model, processor, queries, **options))
    options["shots"] = (2,)
    assert "not known" in str(mk.evaluate(model, processor, queries, **options))
    assert "below 30 records the intervals are too narrow: do not rely on them" in str(made)
    assert "too narrow" not in str(replace(made, records=30))


def test_files(world, tmp_path):
    model, processor, queries, pool = world
    made = mk.evaluate(
        model, processor, queries, shots=(0, 2), demonstrations=pool, out=tmp_path / "out", progress=False
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads(json.dumps(made.results()))
    assert [row["name"] for row in results["rows"]] == ["zero-shot", "2-shot"]
    assert results["rows"][1]["score"] == made["2-shot"].score.value
    assert results["settings"]["prompt"]["template"] == "{image}{text} {answer}"
    assert (tmp_path / "out" / "table.md").read_text() == f"{made}\n"
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(x) for x in (tmp_path / "out" / "2-shot" / "predictions.jsonl").open()]
    builder, records = mk.PromptBuilder(processor), mk.Records(queries)
    for line, record in zip(lines, records, strict=True):
        collate = EpisodeCollator(builder, mk.Records(pool), 2)
        assert line["demonstrations"] == [f"id {x.id}" for x in collate.drawn(record)]
        inputs = builder.prompt([record.demonstration()], [drawn(builder, mk.Records(pool), record, 2)])
        assert line["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert line["image_tokens"] == 3 * 4  # three images of four patches
        assert 0 < line["first_seconds"] < line["seconds"] * 6


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_whatever_the_model_says(world, beams):
    model, processor, queries, _ = world
    options = {"generation": Generation(NEW_TOKENS, num_beams=beams, cut="none"), "progress": False}
    expected = mk.evaluate(model, processor, queries, **options)["zero-shot"].texts
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.num_beams = True, 5.0, 0.3, 4
    own.repetition_penalty, own.no_repeat_ngram_size, own.encoder_repetition_penalty = 9.0, 1, 5.0
    own.suppress_tokens = own.begin_suppress_tokens = list(range(9, 60))
    own.forced_eos_token_id, own.min_new_tokens, own.early_stopping = 9, NEW_TOKENS, True
    own.num_return_sequences, own.return_dict_in_generate, own.stop_strings = 3, True, ["e"]
    own.prompt_lookup_num_tokens, own.sequence_bias = 3, [[[9], 50.0]]
    said = own.to_dict()
    assert mk.evaluate(model, processor, queries, **options)["zero-shot"].texts == expected
    assert model.generation_config is own and own.to_dict() == said


def test_the_papers_beams(world):
    model, processor, queries, _ = world
    made = mk.evaluate(model, processor, queries, generation="mimic-vqa", batch_size=3, progress=False)
    builder, options = (
        mk.PromptBuilder(processor),
        {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 10},
    )
    texts = [said(model, builder, x.demonstration(), **options) for x in mk.Records(queries)]
    assert made["zero-shot"].texts == tuple(postprocess(texts, "vqa"))
    greedy = [said(model, builder, x.demonstration(), max_new_tokens=10) for x in mk.Records(queries)]
    assert texts != greedy
    assert GENERATIONS["mimic-caption"].max_new_tokens == 20 and GENERATIONS["live-vqa"].cut == "live-vqa"


def test_an_answer_ends_with_its_turn(tmp_path):
    """Also where the model's generation_config does not know how the chat template ends one."""
    model, processor = model_and_processor("idefics2", chat=True)
    (end,) = mk.PromptBuilder(processor, "chat").end_ids
    assert processor.tokenizer.convert_ids_to_tokens(end) == "<end_of_utterance>"
    queries = write(tmp_path, "query", rows_of("q", 2))
    calls = []

    def say_the_end(module, arguments, logits):
        calls.append(len(logits))
        return logits.index_fill(-1, torch.tensor([end]), 1e4)

    model.lm_head.register_forward_hook(say_the_end)
    made = mk.evaluate(model, processor, queries, generation=WHOLE, batch_size=2, progress=False)
    assert model.generation_config.eos_token_id == 2
    assert made["zero-shot"].texts == ("", "") and calls == [2]


@pytest.mark.parametrize("cut", ["none", "vqa", ("\n",)])
@pytest.mark.parametrize(
    "template", ["{image}{text} {answer}", "{image}{text} {answer};", "{image}{text} {answer}.\n\n"]
)
def test_an_answer_ends_where_those_of_demonstrations_do(world, template, cut, monkeypatch):
    """Of a model that goes on as its demonstrations do, with the next one."""
    model, processor, queries, pool = world
    builder = mk.PromptBuilder(processor, template)
    copied = processor.tokenizer(f"red{builder.ending}<image>what? red", add_special_tokens=False)[
        "input_ids"
    ]

    def copying(**given):
        ids = given["input_ids"]
        given["logits_processor"][0](ids, torch.zeros(len(ids), 9))
        return torch.cat([ids, torch.tensor(copied).expand(len(ids), -1)], 1)

    monkeypatch.setattr(model, "generate", copying)
    made = mk.evaluate(
        model, builder, queries, shots=(0, 2), demonstrations=pool, generation=Generation(cut=cut),
        progress=False,
    )  # fmt: skip
    assert [set(row.texts) for row in made.rows] == [{"red"}] * 2


@pytest.mark.parametrize("positions, ends", [("answer", 0), ("answer_end", 1)])
def test_those_tokens_are_fused_that_the_adapter_means(positions, ends, world, tmp_path):
    model, processor, queries, pool = world
    builder = mk.PromptBuilder(processor, "{image}{text} {answer}.")
    adapters = {"aim": adapter_of(model, mk.AIMConfig(positions=positions))}
    options = {"shots": (2,), "demonstrations": pool, "out": tmp_path / "out", "progress": False}
    mk.evaluate(model, builder, queries, adapters=adapters, **options)
    bank = mk.DemonstrationBank(tmp_path / "out" / "banks" / "aim")
    assert bank.prompt == f"{builder.description.removesuffix('text')}{positions}"
    tokenizer = processor.tokenizer
    answers = [f" {bank.text(i).answer}" for i in range(len(bank))]
    lengths = [len(tokenizer(x, add_special_tokens=False)["input_ids"]) + ends for x in answers]
    assert bank.lengths.tolist() == lengths


def test_the_model_is_left_plain(world, monkeypatch):
    model, processor, queries, pool = world
    texts = mk.evaluate(model, processor, queries, progress=False)["zero-shot"].texts
    for module in model.modules():  # in training mode it would drop most of what is attended to
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    model.train()
    before = plain_state(model)
    adapters = {"live": adapter_of(model, mk.LIVEConfig()), "aim": adapter_of(model, mk.AIMConfig())}
    options = {"adapters": adapters, "shots": (0, 1), "demonstrations": pool, "progress": False}
    assert mk.evaluate(model, processor, queries, **options)["zero-shot"].texts == texts
    assert mk.handle_of(model) is None and plain_state(model) == before
    generate, calls = model.generate, []

    def failing(**inputs):
        calls.append(mk.handle_of(model) is not None)
        if calls[-1]:
            raise ValueError("out of luck")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", failing)
    with pytest.raises(ValueError, match=r"live, records \['q0', .*: out of luck"):
        mk.evaluate(model, processor, queries, **options)
    assert calls == [False, False, True]
    assert mk.handle_of(model) is None and plain_state(model) == before


def test_yes_or_no(world, tmp_path):
    """The probability of yes is that of its words among those of yes and no, at the first token."""
    model, _, _, _ = world
    from mmicl_kernels.testing.tiny_processors import tiny_processor

    processor = tiny_processor("llava", words=("▁yes", "▁no"))
    rows = [{**row, "answer": ("yes", "no")[i % 2]} for i, row in enumerate(rows_of("q", 6))]
    queries = write(tmp_path, "yes", rows)
    made = mk.evaluate(model, processor, queries, metric="yes-no", auroc=True, batch_size=4, progress=False,
                       out=tmp_path / "out")  # fmt: skip
    builder, tokenizer = mk.PromptBuilder(processor), processor.tokenizer
    words = {word: tokenizer.convert_tokens_to_ids([f"▁{word}", word[0]]) for word in ("yes", "no")}
    expected = []
    for record in mk.Records(queries):
        with torch.no_grad():
            logits = model(**builder.prompt([record.demonstration()])).logits[0, -1].double()
        yes, no = (logits[words[x]].exp().sum() for x in ("yes", "no"))
        expected.append(float(yes / (yes + no)))
    lines = [json.loads(x) for x in (tmp_path / "out" / "zero-shot" / "predictions.jsonl").open()]
    # fp32 logits and their sums: a few roundings of numbers below 10
    np.testing.assert_allclose([x["yes"] for x in lines], expected, rtol=1e-5)
    score = auroc([x["yes"] for x in lines], [1, 0] * 3)
    assert made["zero-shot"].auroc == bootstrap_interval(score.resampled, count=6)
    assert "AUROC" in str(made)
    with pytest.raises(ValueError, match="labels must have both classes"):
        mk.evaluate(model, processor, write(tmp_path, "all", rows[::2]), metric="yes-no", auroc=True)


def test_words_that_begin_alike():
    processor = model_and_processor()[1]
    with pytest.raises(ValueError, match="begins yes and no with the same tokens"):
        YesNo.of(lambda text, add_special_tokens: {"input_ids": [7]})
    assert YesNo.of(processor.tokenizer).yes == (processor.tokenizer.convert_tokens_to_ids("y"),)


@pytest.mark.parametrize("metric", ["vqa", "caption", "choice"])
def test_other_metrics(world, tmp_path, metric):
    from mmicl_kernels.evaluation import METRICS

    model, processor, _, _ = world
    builder, rows = mk.PromptBuilder(processor), rows_of("q", 6)
    texts = [said(model, builder, x.demonstration(), max_new_tokens=4) for x in mk.Records(world[2])]
    for i, row in enumerate(rows):
        row["answers"] = [texts[i], texts[i], "blue", texts[i - 1], "cat"]
        row["choices"] = [row["answer"], "green"]
    queries = write(tmp_path, metric, rows)
    settings = Generation(max_new_tokens=4)
    made = mk.evaluate(model, processor, queries, metric=metric, generation=settings, progress=False)
    cut = postprocess(texts, ("\n",))
    if metric == "choice":
        expected = METRICS[metric](cut, [x["answer"] for x in rows], [x["choices"] for x in rows])
    else:
        expected = METRICS[metric](cut, [x["answers"] for x in rows])
    assert made["zero-shot"].score.samples.tolist() == expected.samples.tolist()
    assert (expected.value > 0) == (metric != "choice")


def test_a_metric_of_ones_own(world):
    from mmicl_kernels.evaluation import Score

    def length(texts, records):
        return Score(0.0, np.array([float(len(x)) for x in texts]))

    made = mk.evaluate(*world[:3], metric=length, generation=WHOLE, progress=False)
    assert made.metric == "length"
    assert made["zero-shot"].score.samples.tolist() == [len(x) for x in made["zero-shot"].texts]


def test_a_metric_that_is_no_mean(world):
    """A ratio of sums is shown, and its intervals are its own."""
    from mmicl_kernels.evaluation.metrics.score import Ratio

    def digits(texts, records):
        counts = [[float(sum(map(test, text))) for text in texts] for test in (str.isdigit, str.isprintable)]
        return Ratio.of(*map(np.array, counts))

    model, processor, queries, pool = world
    made = mk.evaluate(
        model, processor, queries, metric=digits, shots=(0, 2), demonstrations=pool, generation=WHOLE,
        progress=False,
    )  # fmt: skip
    zero, two = (digits(made[x].texts, ()) for x in ("zero-shot", "2-shot"))
    assert zero.value != zero.samples.mean() and zero.value != two.value
    row = made["2-shot"]
    assert row.interval == bootstrap_interval(two.resampled, count=6) and row.interval.value == two.value
    difference = paired_bootstrap(two.resampled, zero.resampled, count=6)
    assert row.minus_zero_shot == made.gap.difference == difference
    assert f"| {zero.value:.3f} [" in str(made)


def test_rows_and_examples_in_memory(world):
    """Rows with image bytes as queries, demonstrations as a pool, which the query is never among."""
    model, processor, queries, _ = world
    rows = [{"image": png("red", (9, 7)), "text": f"what{i}?", "answer": "red"} for i in range(3)]
    pool = [mk.Demonstration((png("blue", (8, 8)),), f"what{i}?", "blue") for i in range(2)]
    made = mk.evaluate(
        model, processor, rows, shots=(0, 2), demonstrations=pool, generation=WHOLE, progress=False
    )
    assert made.records == 3
    with pytest.raises(ValueError, match="the pool has 3 examples, 2 of them others than the query"):
        mk.evaluate(model, processor, rows, shots=(3,), demonstrations=rows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shots": (-1,)}, r"shots is \[-1\], expected different numbers of at least 0"),
        ({"shots": (0, 0)}, r"shots is \[0, 0\], expected different"),
        ({"shots": (2,)}, "demonstrations is None, expected examples for up to 2 shots"),
        ({"shots": ()}, "shots and adapters are empty"),
        ({"metric": "bleu"}, "metric is 'bleu', expected a function or one of vqa, okvqa"),
        ({"metric": "vqa"}, "query.jsonl:1: answers is missing"),
        ({"metric": "choice"}, "query.jsonl:1: choices is missing"),
        ({"metric": "yes-no"}, "query.jsonl:1: answer is 'red', expected yes or no"),
        ({"generation": "slow"}, "generation is 'slow', expected a Generation or one of vqa"),
        ({"retrieval": "nearest"}, "retrieval is 'nearest', expected 'random'"),
        ({"retrieval": "rices"}, "retrieval is 'rices', features None"),
        ({"features": "a"}, "retrieval is 'random', features 'a'"),
        ({"bank": "bank"}, "bank is given, expected an AIM adapter"),
        (
            {"bank": "bank", "adapters": {"learned": "prompt_tuning"}},
            "bank is given, expected an AIM adapter",
        ),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 1}, "records has 1, expected at least 2"),
        ({"adapters": {"a/b": "live"}}, "adapter 'a/b', expected a name of letters"),
        ({"adapters": {"zero-shot": "live"}}, "adapters make the rows zero-shot, zero-shot"),
        ({"adapters": {"Table.md": "live"}}, "an adapter's name is table.md, which is a file of the results"),
        ({"adapters": {"banks": "live"}}, "an adapter's name is banks, which is a file of the results"),
        ({"adapters": {"aim": "aim"}}, r"shots is \[0\], expected one above 0 for 'aim' to fuse"),
    ],
)
def test_errors_before_anything_is_asked(world, options, message, monkeypatch):
    model, processor, queries, _ = world
    monkeypatch.setattr(model, "generate", None)
    configs = {"live": mk.LIVEConfig(), "aim": mk.AIMConfig(), "prompt_tuning": mk.PromptTuningConfig()}
    for name, kind in options.get("adapters", {}).items():
        options = {**options, "adapters": {name: mk.create(model, configs[kind])}}
    with pytest.raises(ValueError, match=message):
        mk.evaluate(model, processor, queries, progress=False, **options)


def test_wrong_types(world):
    model, processor, queries, _ = world
    for given in ({"shots": 4}, {"adapter_shots": 4}):
        with pytest.raises(TypeError, match=f"{next(iter(given))} is 4, expected a list of numbers"):
            mk.evaluate(model, processor, queries, **given)
    with pytest.raises(TypeError, match="adapter 'a' is a NoneType, expected an adapter or its folder"):
        mk.evaluate(model, processor, queries, adapters={"a": None})


def test_bad_records_are_named(world, tmp_path, monkeypatch):
    """A text that no prompt can have before anything is asked; an image when it is read."""
    model, processor, queries, pool = world
    options = {"generation": WHOLE, "progress": False, "batch_size": 2}
    (tmp_path / "p2-0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"pool.jsonl:3: p2-0.png cannot be decoded: it is no image"):
        mk.evaluate(model, processor, queries, shots=(5,), demonstrations=pool, **options)
    with pytest.raises(ValueError, match=r"pool.jsonl:3: p2-0.png cannot be decoded: it is no image"):
        mk.evaluate(model, processor, pool, **options)
    rows = [{"image": png("red", (9, 7)), "text": text, "answer": "red"} for text in ("a", "b", "c<image>")]
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ValueError, match="row 2: text 'c<image>' has '<image>', expected no special"):
        mk.evaluate(model, processor, rows, **options)


def test_a_matplotlib_that_cannot_be_imported(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="scores.png is not made: matplotlib cannot be imported"):
        made = mk.evaluate(*world[:3], out=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "table.md").read_text() == f"{made}\n"
    assert not [x for x in (tmp_path / "out").iterdir() if "png" in x.name]


def test_a_patched_model_is_refused(world):
    model, processor, queries, _ = world
    with mk.attach(model, adapter_of(model, mk.LIVEConfig())), pytest.raises(ValueError, match="mk.detach"):
        mk.evaluate(model, processor, queries)
    with pytest.raises(TypeError, match="adapters is a LIVEAdapter, expected a dict"):
        mk.evaluate(model, processor, queries, adapters=mk.create(model, mk.LIVEConfig()))


def test_prompts_are_those_of_training(world, tmp_path):
    model, processor, queries, _ = world
    live = adapter_of(model, mk.LIVEConfig())
    templates = {
        "a": "{image}q {text} a {answer}",
        "b": "{image}q {text} a {answer}",
        "c": "{image}{text}{answer}",
    }
    for name, template in templates.items():
        live.save_pretrained(tmp_path / name)
        prompt = {"template": template, "instruction": "do.", "image_marker": None}
        (tmp_path / name / "training.json").write_text(json.dumps({"prompt": prompt, "seed": 1}))
    live.save_pretrained(tmp_path / "none")

    def evaluated(processor, *names):
        adapters = {name: tmp_path / name for name in names}
        return mk.evaluate(model, processor, queries, adapters=adapters, generation=WHOLE, progress=False)

    builder = mk.PromptBuilder(processor, templates["a"], instruction="do.")
    expected = tuple(said(model, builder, x.demonstration()) for x in mk.Records(queries))
    assert evaluated(processor, "none", "a", "b")["zero-shot"].texts == expected
    loaded = {"adapters": {"a": mk.load(tmp_path / "a", model)}, "generation": WHOLE, "progress": False}
    assert mk.evaluate(model, processor, queries, **loaded)["zero-shot"].texts == expected
    assert evaluated(processor, "none")["zero-shot"].texts != expected
    message = f"adapters 'a' and 'c' were trained on prompts .*{re.escape(templates['c'])}.* give a template"
    with pytest.raises(ValueError, match=message):
        evaluated(processor, "a", "c")
    assert evaluated(builder, "a", "c")["zero-shot"].texts == expected
    for damaged in ("{", "[]", '{"prompt": {"template": 3}}', '{"prompt": {"template": "", "evil": ""}}'):
        (tmp_path / "a" / "training.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"a/training.json: .*expected"):
            evaluated(processor, "a")
