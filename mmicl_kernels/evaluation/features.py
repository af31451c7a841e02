"""Features by which demonstrations are retrieved: from a file, by CLIP, by any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mmicl_kernels.data import Demonstration, content_digest
from mmicl_kernels.data.decoding import decode_image
from mmicl_kernels.data.shots import NearestShots, demonstration_of, key_of
from mmicl_kernels.durable import replacing
from mmicl_kernels.evaluation.predictions import model_digest

# Features [B, C] of B demonstrations. What has a `digest` too is known by it, and its features are kept.
Embed = Callable[[Sequence[Demonstration]], Tensor]
PARTS = ("demonstrations", "queries")


def nearest_shots(
    queries: Sequence[Any],
    pool: Sequence[Any],
    features: str | Path | Embed,
    *,
    cache: Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> NearestShots:
    """A draw of the most similar ones, the most similar last.

    ``features`` is a safetensors file with ``demonstrations`` ``[N, C]`` and ``queries`` ``[M, C]``,
    floating, a row for each example in order, of which the first ``len(queries)`` count; or a function.

    Raises:
        FileNotFoundError, ValueError: no such file, or what is in it does not fit.
    """
    if callable(features):
        options = {"cache": cache, "batch_size": batch_size, "progress": progress}
        found = [embedded(x, features, **options) for x in (pool, queries)]
    else:
        found = _read(Path(features), (len(pool), len(queries)))
    for name, x in zip(PARTS, found, strict=True):
        expected = f"expected finite ones [N, {found[0].shape[1] or 'C'}] for all"
        if x.shape[1] != found[0].shape[1] or not x.shape[1] or not x.isfinite().all():
            raise ValueError(f"features of {name} are {list(x.shape)}, {expected}")
    places = {key_of(query): i for i, query in enumerate(queries)}

    def embed(query: Any) -> Tensor:
        return found[1][places[key_of(query)]]

    return NearestShots(found[0], embed)


def embedded(
    examples: Sequence[Any],
    embed: Embed,
    *,
    cache: Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """Features float32 ``[N, C]`` of examples, made once: ``cache`` is a folder that keeps them by what
    ``embed.digest`` and the examples' contents are.

    Raises ValueError: ``embed`` returns something else than ``[B, C]``.
    """
    name = getattr(embed, "digest", None)
    kept = None if cache is None or name is None else cache / f"{_content(examples, name)}.safetensors"
    if kept is not None and kept.is_file():
        return load_file(kept)["features"]
    rows = []
    with tqdm(total=len(examples), desc="embedding", unit="example", disable=not progress) as bar:
        for start in range(0, len(examples), batch_size):
            batch = [demonstration_of(examples[i]) for i in range(len(examples))[start : start + batch_size]]
            made = torch.as_tensor(embed(batch))
            width = rows[0].shape[1] if rows else "C"
            if made.dim() != 2 or len(made) != len(batch) or width not in ("C", made.shape[1]):
                raise ValueError(f"features has shape {list(made.shape)}, expected [{len(batch)}, {width}]")
            rows.append(made.detach().float().cpu())
            bar.update(len(batch))
    found = torch.cat(rows)
    if kept is not None:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as (temporary,):
            save_file({"features": found}, temporary)
    return found


class ClipImages:
    """Image features of a CLIP of transformers, from its folder: what RICES compares.

    Of several images the mean; a demonstration without one has zeros, and is similar to nothing.

    Raises:
        FileNotFoundError: no such folder. OSError, ValueError: it holds no CLIP, or not all that makes image
        features.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPConfig, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        if not Path(folder).is_dir():
            raise FileNotFoundError(f"clip: {folder} does not exist, expected a folder")
        kind = CLIPConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"clip: {folder} has a model of type {kind!r}, expected 'clip'")
        options = {"local_files_only": True, "output_loading_info": True}
        model, loading = CLIPModel.from_pretrained(folder, **options)
        parts = ("vision_model.", "visual_projection.")
        missing = sorted(name for name in loading["missing_keys"] if name.startswith(parts))
        if missing:
            raise ValueError(f"clip: {folder} has no {', '.join(missing[:3])}, expected a whole CLIP")
        self.model = model.eval().to(device)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.digest = f"clip {model_digest(self.model)} {self.processor.to_json_string()}"

    @torch.no_grad()
    def __call__(self, demonstrations: Sequence[Demonstration]) -> Tensor:
        """Float32 ``[B, C]``. Raises ValueError: an image cannot be decoded."""
        images = [
            decode_image(data, f"image {j} of {x.text!r:.40}")
            for x in demonstrations for j, data in enumerate(x.images)
        ]  # fmt: skip
        made = torch.zeros(len(demonstrations), self.model.config.projection_dim)
        if images:
            pixels = self.processor(images, return_tensors="pt").to(self.model.device, self.model.dtype)
            pooled = self.model.vision_model(**pixels).pooler_output
            rows = (
                self.model.visual_projection(pooled)
                .float()
                .cpu()
                .split([len(x.images) for x in demonstrations])
            )
            for i, row in enumerate(rows):
                if len(row):
                    made[i] = row.mean(0)
        return made


def _read(path: Path, counts: tuple[int, int]) -> list[Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"features: {path} does not exist, expected a safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"features: {path} is no safetensors file: {error}") from error
    if set(tensors) != set(PARTS):
        raise ValueError(f"features: {path} has {sorted(tensors)}, expected {list(PARTS)}")
    for name, count in zip(PARTS, counts, strict=True):
        x = tensors[name]
        enough = x.dim() == 2 and (len(x) == count if name == "demonstrations" else len(x) >= count)
        if not x.is_floating_point() or not enough:
            raise ValueError(
                f"features: {path} has {name} {x.dtype} {list(x.shape)}, expected floating [{count}, C]"
            )
    return [tensors[name].float() for name in PARTS]


def _content(examples: Sequence[Any], name: str) -> str:
    shown = (demonstration_of(examples[i]) for i in range(len(examples)))
    parts = (content_digest((x.text.encode(), x.answer.encode(), *x.images)) for x in shown)
    return content_digest(parts, name.encode()).hex()
