"""Scores of generated answers and captions; needs the standard library and numpy alone (OK-VQA: nltk)."""

from .caption import cider
from .chair import Chair, chair, mentions, read_synonyms
from .choice import AurocScore, auroc, choice_accuracy, choice_of, exact_match, yes_no_accuracy, yes_no_of
from .okvqa import learned_stemmer, nltk_stemmer, okvqa_accuracy
from .postprocess import PRESETS, postprocess
from .score import Ratio, Score
from .tokens import caption_tokens
from .vqa import VARIANTS, normalize_answer, vqa_accuracy

# Metrics of predictions [N] and answers [N]; "choice" takes the choices [N] as well.
METRICS = {
    "vqa": vqa_accuracy,
    "okvqa": okvqa_accuracy,
    "caption": cider,
    "exact": exact_match,
    "choice": choice_accuracy,
    "yes-no": yes_no_accuracy,
}

__all__ = [
    "METRICS",
    "PRESETS",
    "VARIANTS",
    "AurocScore",
    "Chair",
    "Ratio",
    "Score",
    "auroc",
    "caption_tokens",
    "chair",
    "choice_accuracy",
    "choice_of",
    "cider",
    "exact_match",
    "learned_stemmer",
    "mentions",
    "nltk_stemmer",
    "normalize_answer",
    "okvqa_accuracy",
    "postprocess",
    "read_synonyms",
    "vqa_accuracy",
    "yes_no_accuracy",
    "yes_no_of",
]
