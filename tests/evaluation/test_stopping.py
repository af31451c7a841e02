"""An answer ends where what follows would be cut off: the same texts for fewer passes of the model."""

from dataclasses import replace

import pytest
from questions import model_and_processor, rows_of, write

import mmicl_kernels as mk
from mmicl_kernels.evaluation.generation import Generation
from mmicl_kernels.evaluation.metrics import postprocess
from mmicl_kernels.evaluation.metrics.postprocess import PRESETS, is_cut

NEW_TOKENS = 16
WHOLE = Generation(max_new_tokens=NEW_TOKENS, cut="none")


def asked(folder, generation, batch_size=1, template="{image}{text} {answer}"):
    """The texts of six records, and how often the model was called."""
    model, processor = model_and_processor()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    made = mk.evaluate(
        model, mk.PromptBuilder(processor, template), write(folder, "query", rows_of("q", 6)),
        generation=generation, batch_size=batch_size, progress=False,
    )  # fmt: skip
    return made["zero-shot"].texts, len(calls)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_same_texts_for_fewer_passes(batch_size, tmp_path):
    whole, most = asked(tmp_path, WHOLE, batch_size)
    words = tuple({text[len(text) // 3] for text in whole})
    texts, calls = asked(tmp_path, replace(WHOLE, cut=words), batch_size)
    assert texts == tuple(postprocess(whole, words))
    assert any(texts) and texts != whole
    assert calls < most


def test_the_ending_of_a_template_is_where_an_answer_ends(tmp_path):
    whole, most = asked(tmp_path, WHOLE)
    word = whole[0][len(whole[0]) // 3]
    template = f"{{image}}{{text}} {{answer}}{word}"
    texts, calls = asked(tmp_path, WHOLE, template=template)
    assert texts[0] == whole[0].partition(word)[0].strip()
    assert calls < most


def test_beams_are_searched_to_their_end(tmp_path):
    beams = replace(WHOLE, num_beams=2)
    whole, most = asked(tmp_path, beams)
    word = whole[0][len(whole[0]) // 2]
    texts, calls = asked(tmp_path, replace(beams, cut=(word,)))
    assert texts == tuple(postprocess(whole, (word,)))
    assert calls == most


@pytest.mark.parametrize("preset", [*PRESETS, ("\n", "stop"), ()])
@pytest.mark.parametrize("ending", ["", "\n\n", "<end>"])
def test_nothing_that_follows_changes_what_is_cut(preset, ending):
    text = "a cat, Short of breath<end>Question\n\nstop"
    for length in range(len(text) + 1):
        if is_cut(text[:length], preset, ending):
            assert postprocess([text[:length]], preset, ending) == postprocess([text], preset, ending)
    never = preset in ("none", ()) and not ending
    assert is_cut(text, preset, ending) is not never
