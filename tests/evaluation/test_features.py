"""Retrieval by features: given in a file, embedded by a function, by CLIP; made once."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mmicl_kernels as mk
from mmicl_kernels.evaluation.features import ClipImages, embedded, nearest_shots
from mmicl_kernels.evaluation.generation import Generation
from tests.support.example_images import png
from tests.support.questions import model_and_processor, rows_of, write


@pytest.fixture
def files(tmp_path):
    return write(tmp_path, "query", rows_of("q", 3)), write(tmp_path, "pool", rows_of("p", 4))


def shown(out):
    lines = [json.loads(x) for x in (out / "2-shot" / "predictions.jsonl").open()]
    return [x["demonstrations"] for x in lines]


def test_features_of_a_file(files, tmp_path):
    """The two with the largest cosines, the nearest beside the query."""
    queries, pool = files
    rows = {
        "demonstrations": torch.tensor([[1.0, 0], [2, 1], [1, 3], [0, 5]]),
        "queries": torch.tensor([[3.0, 0], [0, 1], [-1, -1]]),
    }
    save_file(rows, tmp_path / "features.safetensors")
    model, processor = model_and_processor()
    options = {"shots": (2,), "demonstrations": pool, "retrieval": "rices", "progress": False}
    options |= {"features": tmp_path / "features.safetensors", "generation": Generation(2)}
    mk.evaluate(model, processor, queries, out=tmp_path / "out", **options)
    expected = [["id p1", "id p0"], ["id p2", "id p3"], ["id p3", "id p0"]]  # of equals the first is nearer
    assert shown(tmp_path / "out") == expected
    save_file({**rows, "queries": rows["queries"][:2]}, tmp_path / "features.safetensors")
    with pytest.raises(ValueError, match=r"has queries torch.float32 \[2, 2\], expected floating \[3, C\]"):
        mk.evaluate(model, processor, queries, **options)
    for other in (torch.ones(3, 3), torch.full((3, 2), torch.nan)):
        save_file({**rows, "queries": other}, tmp_path / "features.safetensors")
        message = rf"features of queries are \[3, {other.shape[1]}\], expected finite ones \[N, 2\] for all"
        with pytest.raises(ValueError, match=message):
            mk.evaluate(model, processor, queries, **options)
    save_file({"demonstrations": torch.ones(4, 0), "queries": torch.ones(3, 0)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"features of demonstrations are \[4, 0\], expected finite"):
        mk.evaluate(model, processor, queries, **{**options, "features": tmp_path / "0.safetensors"})
    save_file({"queries": rows["queries"]}, tmp_path / "features.safetensors")
    with pytest.raises(ValueError, match=r"has \['queries'\], expected \['demonstrations', 'queries'\]"):
        mk.evaluate(model, processor, queries, **options)
    (tmp_path / "features.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="features.safetensors is no safetensors file"):
        mk.evaluate(model, processor, queries, **options)
    with pytest.raises(FileNotFoundError, match="features: none does not exist"):
        mk.evaluate(model, processor, queries, **{**options, "features": "none"})


class Lengths:
    """The length of a text and of its answer."""

    digest = "lengths"

    def __init__(self):
        self.calls = []

    def __call__(self, demonstrations):
        self.calls.append(len(demonstrations))
        return torch.tensor([[float(len(x.text)), len(x.answer)] for x in demonstrations])


def test_embedding_functions_and_their_cache(files, tmp_path):
    queries, pool = (mk.Records(x) for x in files)
    embed = Lengths()
    draw = nearest_shots(queries, pool, embed, cache=tmp_path / "kept", batch_size=3, progress=False)
    assert embed.calls == [3, 1, 3]
    expected = torch.tensor([[float(len(x.text)), len(x.answer)] for x in pool])
    assert torch.equal(draw.features, torch.nn.functional.normalize(expected, dim=-1))
    again = nearest_shots(queries, pool, embed, cache=tmp_path / "kept", progress=False)
    assert embed.calls == [3, 1, 3]
    assert torch.equal(again.features, draw.features)
    assert draw(pool, queries[0], 3, None) == again(pool, queries[0], 3, None)
    embedded(queries, embed, progress=False)
    embedded(queries, lambda rows: Lengths()(rows), cache=tmp_path / "kept", progress=False)
    assert embed.calls == [3, 1, 3, 3] and len(list((tmp_path / "kept").iterdir())) == 2
    other = Lengths()
    other.digest = "other"
    embedded(queries, other, cache=tmp_path / "kept", progress=False)
    assert other.calls == [3]
    with pytest.raises(ValueError, match=r"features has shape \[3\], expected \[3, C\]"):
        embedded(queries, lambda rows: torch.ones(len(rows)), progress=False)
    with pytest.raises(ValueError, match=r"features has shape \[1, 1\], expected \[1, 2\]"):
        embedded(queries, lambda rows: torch.ones(len(rows), len(rows)), batch_size=2, progress=False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        text_config={**sizes, "vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        projection_dim=6,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    square = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size=square, crop_size=square).save_pretrained(folder)
    return folder


def test_clip(clip, files, tmp_path):
    """As the whole CLIP makes them of each image."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    embed = ClipImages(clip)
    red, blue = png("red", (9, 7)), png("blue", (20, 9))
    rows = [mk.Demonstration(x, "", "") for x in ((red,), (), (red, blue))]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    from mmicl_kernels.data.decoding import decode_image

    pixels = processor([decode_image(x, "") for x in (red, blue)], return_tensors="pt")
    with torch.no_grad():
        made = model.get_image_features(**pixels)
    features = getattr(made, "pooler_output", made)  # as its version of transformers returns them
    expected = torch.stack([features[0], torch.zeros(6), features.mean(0)])
    torch.testing.assert_close(embed(rows), expected)
    queries, pool = files
    model, processor = model_and_processor()
    options = {"shots": (2,), "demonstrations": pool, "retrieval": "rices", "out": tmp_path / "out"}
    mk.evaluate(model, processor, queries, features=embed, progress=False, **options)
    colours = {f"id {x.id}": x.answer for x in mk.Records(pool)}
    for record, row in zip(mk.Records(queries), shown(tmp_path / "out"), strict=True):
        assert [colours[x] for x in row] == [record.answer] * 2
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2
    with pytest.raises(FileNotFoundError, match="clip: none does not exist"):
        ClipImages("none")


def test_what_is_no_whole_clip(clip, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip)
    model.vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="tower has a model of type 'clip_vision_model', expected 'clip'"):
        ClipImages(tmp_path / "tower")
    weights = {name: x for name, x in model.state_dict().items() if not name.startswith("visual_proj")}
    model.save_pretrained(tmp_path / "part", state_dict=weights)
    with pytest.raises(ValueError, match="part has no visual_projection.weight, expected a whole CLIP"):
        ClipImages(tmp_path / "part")
