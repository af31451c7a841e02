"""An answer ends at what its template has after one: the same texts for fewer passes of the model."""

from dataclasses import replace

import pytest

import mmicl_kernels as mk
from mmicl_kernels.evaluation.generation import Generation
from mmicl_kernels.evaluation.metrics import postprocess
from tests.support.questions import model_and_processor, rows_of, write

NEW_TOKENS = 16
WHOLE = Generation(max_new_tokens=NEW_TOKENS, cut="none")


def asked(folder, generation=WHOLE, ending="", batch_size=1, out=None):
    """The texts of six records, and how often the model was called."""
    model, processor = model_and_processor()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    made = mk.evaluate(
        model, mk.PromptBuilder(processor, f"{{image}}{{text}} {{answer}}{ending}"),
        write(folder, "query", rows_of("q", 6)),
        generation=generation, batch_size=batch_size, progress=False, out=out,
    )  # fmt: skip
    return made["zero-shot"].texts, len(calls)


@pytest.fixture
def whole(tmp_path):
    """Answers to their last token, and an ending that some of them have before it."""
    texts, calls = asked(tmp_path)
    assert calls == 6 * NEW_TOKENS
    ending = texts[0][len(texts[0]) // 3]
    assert len({ending in text for text in texts}) == 2 and ending.strip()
    return texts, ending


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_same_texts_for_fewer_passes(batch_size, whole, tmp_path):
    texts, ending = whole
    found, calls = asked(tmp_path, ending=ending, batch_size=batch_size)
    assert found == tuple(postprocess(texts, "none", ending)) != texts
    if batch_size == 1:  # a batch goes on until all of its rows are over
        assert calls < 6 * NEW_TOKENS


def test_an_answer_is_over_at_the_first_token_with_its_ending(whole, tmp_path):
    texts, ending = whole
    found, calls = asked(tmp_path, ending=ending)
    longest = [
        next((n for n in range(1, NEW_TOKENS) if ending in text[: n + 1]), NEW_TOKENS) for text in texts
    ]  # a token has one character at least
    assert calls <= sum(min(n + 1, NEW_TOKENS) for n in longest)


def test_spaces_are_no_ending(tmp_path):
    texts, calls = asked(tmp_path, ending="  ")
    assert calls == 6 * NEW_TOKENS


def test_beams_are_searched_to_their_end(whole, tmp_path):
    _, ending = whole
    beams = replace(WHOLE, num_beams=2)
    texts, most = asked(tmp_path, beams)
    found, calls = asked(tmp_path, beams, ending=ending)
    assert found == tuple(postprocess(texts, "none", ending))
    assert calls == most


@pytest.mark.parametrize("ending", [False, True])
def test_another_cut_has_the_same_answers(ending, whole, tmp_path):
    """What is generated does not depend on it, so an evaluation may go on with another metric."""
    texts, word = whole
    ending = word if ending else ""
    cut = replace(WHOLE, cut=(texts[-1][1],))
    fresh, _ = asked(tmp_path, ending=ending)
    one, calls = asked(tmp_path, cut, ending=ending, out=tmp_path / "out")
    two, again = asked(tmp_path, ending=ending, out=tmp_path / "out")
    assert one == tuple(postprocess(texts, cut.cut, ending)) != two
    assert two == fresh and calls > 0 and again == 0
