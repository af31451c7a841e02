"""OK-VQA (Marino et al., CVPR 2019): VQA accuracy of stemmed words.

The official files hold each answer twice, as it was said (``raw_answer``) and stemmed (``answer``). The
papers stem the prediction alone and compare it with the stemmed answers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

from .score import Score, check_lengths, check_text
from .vqa import vqa_accuracy
from .words import singular

Stemmer = Callable[[str], str]

# Where the data set's stems are not what the rules give (found by OpenFlamingo's authors, who compared both
# answers of the official files; ICLTestbed, MimIC and LIVE have the same table). `word:stem`, or a word that
# stays.
_EXCEPTIONS = """
    adhesives:adhesive alertness:alert alpes:alp apartments:apart are awning:awn backpackers:backpack
    badness:bad baldness:bald bases:base batter's:batter belongings:belong blindness:blind boy's:boy
    braves:brave brightness:bright browsing:brows buildings:build casings:case caves:cave
    charioteering:chariot childrens:children christmas circuses:circus clothes:cloth clothing:cloth
    coding:code conducter:conduct conferences:confer coniferous:conifer containers:contain
    controllers:control corgie:corgi couponing:coupon creame:cream crepte:crept cumulis:cumuli
    curiousity:curious dangerous:danger daughter's:daughter decorations:decor designers:design dining:dine
    directions:direct domino's:domino doves:dove drives:drive drunkenness:drunken earing:ear earnings:earn
    eatting:eat electicity:elect electronics:electron elevators:elev emirates:emir expressions:express
    farmer's:farmer firefighters:firefight firefighting:firefight glaced:glace gloves:glove
    gondoliere:gondolier graves:grave haircutting:haircut hamburgers:hamburg hawke:hawk hearding:heard
    hell's:hell hornes:horn illness:ill jeans:jean kid's:kid kindergartener:kindergarten kiting:kite las
    leaves:leaf lenses:lens lowes:low markings:mark married mating:mate meetings:meet men's:men
    microwaves:microwave minerals:miner mopeds:mope morning:morn mountainous:mountain mustange:mustang
    nationals:nation overseas:oversea oxygenize:oxygen paintings:paint paned:pane paring:pare pease:peas
    personals:person pies:pie piping:pipe plating:plate playfulness:play polarizing:polar police
    pooping:poop porche:porch potatoe:potato professionals:profession projections:project propellers:propel
    protesters:protest pudding:pud purring:pure quantas:quanta rabbies:rabbi raines:rain reflections:reflect
    regent's:regent reminders:remind reporters:report revelations:revel riding:ride ringe:ring ripeness:ripe
    rodeoing:rodeo routes:rout sadness:sad sautee:saute scrapbooking:scrapbook settings:set shelves:shelve
    sickness:sick skateboarders:skateboard smugness:smug socializing:social sometimes:sometime staring:stare
    stockings:stock striping:stripe sunbathing:sunbath sunblocker:sunblock suspenders:suspend swining:swine
    teasing:teas teething:teeth tennis tenning:ten texting:text ties:tie toileting:toilet tomatoe:tomato
    toppings:top transitions:transit travelers:travel travellers:travel urinating:urine vacationing:vacate
    vandalizers:vandal vastness:vast vegas veteran's:veteran wading:wade walle:wall waves:wave weddings:wed
    wetness:wet wilderness:wilder womens:women yes
"""
EXCEPTIONS = {word: stem or word for word, _, stem in (x.partition(":") for x in _EXCEPTIONS.split())}

_MISSING = (
    "OK-VQA's stemming needs nltk and inflection: pip install 'mmicl-kernels[okvqa]'. Without them give "
    "stem=learned_stemmer(raw_answers, answers), made from the official annotations, or stem=str for none"
)
_DATA = (
    "OK-VQA's stemming needs data of nltk: python -m nltk.downloader punkt punkt_tab "
    "averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet"
)


def okvqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    stem: Stemmer | None = None,
    variant: str = "testbed",
) -> Score:
    """``vqa_accuracy`` of stemmed predictions against the *stemmed* official answers (``answers[i].answer``).

    ``stem``: by default ``nltk_stemmer()``, the papers' own; see ``learned_stemmer`` for one without nltk.
    ``variant`` as in ``vqa_accuracy``.

    Raises what ``vqa_accuracy`` and the stemmer raise.
    """
    check_lengths(predictions=predictions, answers=answers)
    stem = nltk_stemmer() if stem is None else stem
    stemmed = [stem(check_text("predictions", i, x)) for i, x in enumerate(predictions)]
    return vqa_accuracy(stemmed, answers, variant=variant)


def nltk_stemmer() -> Stemmer:
    """The papers' stemmer (``OKVQAStemmer`` of OpenFlamingo, ICLTestbed, MimIC, LIVE).

    Word by word: the table of exceptions, else the verb's lemma of an ``-ing`` word (WordNet), else the
    singular of what nltk tags as a plural. Case stays. Its results are those of the installed nltk and of
    its data, whose tagger has changed over the years; they were not compared with the papers' versions.

    Raises ``ImportError`` if nltk or inflection is missing, and ``LookupError`` from the stemmer if nltk's
    data is.
    """
    try:
        import inflection
        import nltk
    except ImportError as error:
        raise ImportError(_MISSING, name=error.name) from error
    return _NltkStemmer(nltk, inflection.singularize)


class _NltkStemmer:
    def __init__(self, nltk: ModuleType, singularize: Callable[[str], str]):
        self._nltk, self._singularize = nltk, singularize
        self._lemmatizer = nltk.stem.WordNetLemmatizer()

    def __call__(self, text: str) -> str:
        try:
            tagged = self._nltk.pos_tag(self._nltk.word_tokenize(text))
            return " ".join(self._word(word, tag) for word, tag in tagged)
        except LookupError as error:
            raise LookupError(f"{_DATA}\n{error}") from error

    def _word(self, word: str, tag: str) -> str:
        if word in EXCEPTIONS:
            return EXCEPTIONS[word]
        if word.endswith("ing"):
            return self._lemmatizer.lemmatize(word, "v")
        return self._singularize(word) if tag in ("NNS", "NNPS") else word


def learned_stemmer(raw_answers: Sequence[str], answers: Sequence[str]) -> Stemmer:
    """A stemmer read off the official annotations: ``raw_answers[i]`` was stemmed to ``answers[i]``.

    Where both have as many words, each word is taken to have become the word at its place; of several stems
    the most frequent wins. A word that no annotator used goes through the table of exceptions and then loses
    its plural by rule, so an unseen ``-ing`` form stays. Words are compared in lower case, without
    punctuation.

    This is not the papers' stemmer: words whose stem depends on the sentence get one stem here. It needs
    neither nltk nor its data, and is right wherever annotators used the prediction's words unambiguously.

    Raises ``ValueError`` if the lengths differ or no pair has equally many words.
    """
    check_lengths(raw_answers=raw_answers, answers=answers)
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for i, (raw, stemmed) in enumerate(zip(raw_answers, answers, strict=True)):
        words, stems = _words(check_text("raw_answers", i, raw)), _words(check_text("answers", i, stemmed))
        if len(words) == len(stems):
            for word, found in zip(words, stems, strict=True):
                seen[word][found] += 1
    if not seen:
        raise ValueError(
            f"none of {len(answers)} pairs of raw_answers and answers has as many words on both sides"
        )
    table = {word: stems.most_common(1)[0][0] for word, stems in seen.items()}

    @cache
    def stem_of(word: str) -> str:
        return table.get(word) or EXCEPTIONS.get(word) or singular(word)

    return lambda text: " ".join(stem_of(word) for word in _words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['.,:-]\w+)*", text.lower())
