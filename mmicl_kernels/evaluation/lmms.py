"""lmms-eval's plug-in: ``--model mmicl --model_args pretrained=DIR,adapter=DIR,shots=2,demonstrations=F``."""

from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from mmicl_kernels.data import Demonstration, Records
from mmicl_kernels.data.images import image_bytes
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.evaluation.asking import OtherImages, asker_of
from mmicl_kernels.evaluation.generation import Generation
from mmicl_kernels.evaluation.metrics import postprocess
from mmicl_kernels.models.pretrained import load_model, load_processor


def manifest() -> ModelManifest:
    return ModelManifest("mmicl", simple_class_path=f"{__name__}.LmmsModel")


class LmmsModel(lmms):
    """A model, its adapter, and before a query ``shots`` records of a file that do not show the same."""

    def __init__(self, pretrained: str, adapter: str | None = None, shots: int = 0, demonstrations: str = "",
                 template: str | None = None, seed: int = 0, batch_size: int = 1, device: str | None = None,
                 max_batch_size: int | None = None) -> None:  # fmt: skip
        super().__init__()
        model, processor = load_model(pretrained, device=device), load_processor(pretrained)
        self._folder = TemporaryDirectory()
        prompts = processor if template is None else PromptBuilder(processor, template)
        self._ask = asker_of(model, prompts, adapter, Path(self._folder.name) / "bank")
        self._draw = OtherImages(Records(demonstrations) if shots else (), shots, seed)
        self.batch_size, self.device = int(batch_size), model.device

    def generate_until(self, requests: list) -> list[str]:
        texts: list[str] = []
        with tqdm(total=len(requests), unit="query") as bar:
            for _, same in groupby((x.args for x in requests), key=lambda row: str(row[1])):
                rows = list(same)
                for start in range(0, len(rows), self.batch_size):
                    texts += self._answers(rows[start : start + self.batch_size])
                    bar.update(len(texts) - bar.n)
        return texts

    def _answers(self, rows: list[tuple]) -> list[str]:
        queries, settings = [], Generation.of(rows[0][1])
        for text, _, visuals, document, task, split in rows:
            images = tuple(map(image_bytes, visuals(self.task_dict[task][split][document]) or ()))
            queries.append(Demonstration(images, text.replace("{image}", "{{image}}"), ""))
        texts = self._ask(queries, [*map(self._draw, queries)], settings).texts
        return postprocess(texts, settings.cut, self._ask.builder.ending)

    def loglikelihood(self, requests: list) -> list:
        raise NotImplementedError("mmicl answers; it does not say how likely given answers are")

    generate_until_multi_round = loglikelihood
