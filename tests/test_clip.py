"""CLIP: transformers' and torchmetrics' numbers with the same random weights; OpenAI's layout; refusals.

Oracles   transformers, torchmetrics, and OpenAI's published layers, written here
"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from pictures import PARITY, SIZES, apart, lazy, picture, random_state, refuses
from safetensors.torch import save_file
from torch import nn

from checkpoint import LazyTensor, Weights
from scores import clip
from scores.clip import CLIP, CLIPImage, clip_score, read_towers
from scores.perceptual import clip_pixels
from text import CLIPText, CLIPTokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]
VOCABULARY = Path(__file__).parents[1] / "models" / "tiny-sd3" / "tokenizer"
TINY = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu")


def words():
    return CLIPTokenizer.load(VOCABULARY).size


def transformers_clip(patch=16, **text):
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": words() - 2, "eos_token_id": words() - 1, "pad_token_id": words() - 1}
    text = dict(TINY, vocab_size=words(), max_position_embeddings=77, **ends, **text)
    config = transformers.CLIPConfig(vision_config=dict(TINY, image_size=224, patch_size=patch), projection_dim=64,
                                     text_config=text)
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(random_state({name: t.shape for name, t in model.state_dict().items()}))
    return model


def transformers_processor():
    """What torchmetrics calls, with Pillow's image processor: the other one needs torchvision."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    return transformers.CLIPProcessor(CLIPImageProcessorPil(), transformers.CLIPTokenizer.from_pretrained(VOCABULARY))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """transformers' CLIP and its folder, as openai/clip-vit-base-patch16 is downloaded."""
    folder = tmp_path_factory.mktemp("clip-vit-base-patch16")
    model = transformers_clip()
    model.save_pretrained(folder)
    for name in os.listdir(VOCABULARY):
        (folder / name).symlink_to(VOCABULARY / name)
    return model, folder


@pytest.mark.parametrize("size", [(2048, 1536), (333, 517), (224, 224), (100, 87), (229, 224), (1000, 3)])
def test_clip_pixels_are_those_of_transformers(size):
    image = picture(*size)
    expected = transformers_processor().image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert apart(clip_pixels([image]), expected) < 1e-6


def test_clip_crop_of_openai_rounds_half_the_margin_to_even():
    image = picture(227, 224)  # a margin of 3: transformers begins at 1, torchvision at 2
    pixels, other = clip_pixels([image]), clip_pixels([image], crop="openai")
    assert torch.equal(pixels[:, :, :, 1:], other[:, :, :, :-1]) and not torch.equal(pixels, other)
    image = picture(229, 224)  # a margin of 5: both begin at 2
    assert torch.equal(clip_pixels([image]), clip_pixels([image], crop="openai"))
    with pytest.raises(ValueError, match="transformers"):
        clip_pixels([image], crop="left")


def test_clip_image_tower_equals_transformers_on_pictures(hugging_face):
    model, folder = hugging_face
    ours, processor = CLIPImage.load(folder), transformers_processor().image_processor
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    with torch.no_grad():
        expected = model.get_image_features(processor(images=images, return_tensors="pt")["pixel_values"]).pooler_output
    assert apart(ours.embed(images), expected) < PARITY
    assert apart(CLIPImage.load(folder / "model.safetensors").embed(images[1][None]), expected[1:]) < PARITY


CAPTIONS = ["a red fox in the snow, golden light", "Dandelion seeds on a dark lake"]


def test_clip_score_equals_torchmetrics(hugging_face):
    functional = pytest.importorskip("torchmetrics.functional.multimodal", reason="torchmetrics is not installed")
    model, folder = hugging_face

    class Returns:  # tensors, as transformers 4 did and torchmetrics expects
        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, *args):
            return model.get_image_features(*args).pooler_output

        def get_text_features(self, *args):
            return model.get_text_features(*args).pooler_output

    clip, images = CLIP.load(folder), [picture(*size, seed) for seed, size in enumerate(SIZES)]
    scores = clip.score(images, CAPTIONS)
    with torch.no_grad():
        for image, caption, score in zip(images, CAPTIONS, scores, strict=True):
            expected = functional.clip_score(image, caption, lambda: (Returns(), transformers_processor()))
            assert abs(float(score) - float(expected)) < 1e-3               # of 100: 1e-5
    assert scores.min() >= 0 and scores.abs().max() > 0.5 and scores.shape == (2,)
    assert float(clip_score(torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]]))) == 0


def test_a_long_caption_keeps_its_end_token_and_warns(hugging_face):
    clip = CLIP.load(hugging_face[1])
    with pytest.warns(UserWarning, match="cut to the limit of 75"):
        long = clip.embed(["a red fox in the snow " * 40])
    with pytest.warns(UserWarning, match="cut to the limit of 75"):
        assert torch.equal(long, clip.embed(["a red fox in the snow " * 40 + "and a lake"]))
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        clip.score(picture(30, 30)[None], CAPTIONS)


class OpenAIBlock(nn.Module):
    """A layer of openai/CLIP, by its published names; torch's own MultiheadAttention."""

    def __init__(self, width, mlp_width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class OpenAITower(nn.Module):
    def __init__(self, width, mlp_width, depth):
        super().__init__()
        self.resblocks = nn.ModuleList(OpenAIBlock(width, mlp_width) for _ in range(depth))


class OpenAIVisual(nn.Module):
    def __init__(self, width, mlp_width, depth, patch, projection):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((224 // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenAITower(width, mlp_width, depth)
        self.proj = nn.Parameter(torch.empty(width, projection))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.repeat(len(x), 1, 1), x), 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x, None)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenAI(nn.Module):
    """openai/CLIP with a vision transformer, by its published names."""

    def __init__(self, width, mlp_width, depth, patch, projection, words, text_width, text_mlp_width, text_depth):
        super().__init__()
        self.visual = OpenAIVisual(width, mlp_width, depth, patch, projection)
        self.transformer = OpenAITower(text_width, text_mlp_width, text_depth)
        self.token_embedding = nn.Embedding(words, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(77, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, projection))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, pixels, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((77, 77), float("-inf"), device=x.device).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
        return self.visual(pixels), x


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A traced CLIP in half precision, as ViT-L-14.pt is, and the same module in float32."""
    path = tmp_path_factory.mktemp("openai") / "ViT-L-14.pt"
    model = OpenAI(128, 192, 2, 14, 96, words(), 64, 128, 2).eval()
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    model.load_state_dict(random_state(shapes) | {"input_resolution": torch.tensor(224)})
    model.half().float()                                                    # the values that half precision has
    pixels, tokens = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    traced = torch.jit.trace(copy.deepcopy(model), (pixels, tokens), check_trace=False)
    for t in traced.parameters():
        t.data = t.data.half()
    traced.save(str(path))
    return path, model


def test_clip_of_openai_archive_equals_the_module_it_was_made_of(archive):
    path, model = archive
    clip = CLIP.load(path, VOCABULARY)
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    with torch.no_grad():
        image, text = model(clip_pixels(images), clip.tokenizer(CAPTIONS, 77))
    assert apart(clip.image.embed(images), image) < PARITY and apart(clip.embed(CAPTIONS), text) < PARITY
    assert apart(CLIPImage.load(path).embed(images), image) < PARITY


def test_clip_reads_a_plain_state_dict_of_openai_and_a_pickle_of_hugging_face(archive, hugging_face, tmp_path):
    images = [picture(300, 224)]
    torch.save(archive[1].state_dict(), tmp_path / "ViT-L-14.pt")
    expected = CLIPImage.load(archive[0]).embed(images)
    assert apart(CLIPImage.load(tmp_path / "ViT-L-14.pt").embed(images), expected) < 1e-5
    model, folder = hugging_face
    state = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert apart(CLIPImage.load(tmp_path).embed(images), CLIPImage.load(folder).embed(images)) < 1e-5


class Built(Exception):
    """The names and shapes fitted; nothing is allocated after that."""


PUBLISHED = {"ViT-B-16": (768, 3072, 12, 16, 512, 49408, 512, 2048, 12),
             "ViT-L-14": (1024, 4096, 24, 14, 768, 49408, 768, 3072, 12)}


@pytest.mark.parametrize("layout", ["openai", "transformers"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_clip_takes_exactly_the_published_names(name, layout, monkeypatch):
    width, mlp_width, depth, patch, projection, vocabulary, text_width, text_mlp_width, text_depth = PUBLISHED[name]
    with torch.device("meta"):
        if layout == "openai":
            model = OpenAI(*PUBLISHED[name])
        else:
            transformers = pytest.importorskip("transformers")
            vision = dict(hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=depth,
                          num_attention_heads=width // 64, patch_size=patch, image_size=224)
            text = dict(hidden_size=text_width, intermediate_size=text_mlp_width, num_hidden_layers=text_depth,
                        num_attention_heads=text_width // 64, vocab_size=vocabulary)
            model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text,
                                                                   projection_dim=projection))
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}

    def built():
        raise Built
    official = Weights({key: LazyTensor(shape, built) for key, shape in shapes.items()}, {}, name)
    monkeypatch.setattr(clip, "open_official", lambda path: official)
    image, text = clip.read_towers(name)
    for build in (lambda: CLIPImage.of(image, "cpu"), lambda: CLIPText.load(text)):
        with pytest.raises(Built):
            build()


def test_clip_refuses_one_wrong_name(archive, hugging_face, monkeypatch):
    shapes = {name: tuple(t.shape) for name, t in archive[1].state_dict().items()}
    layer = "vision_model.encoder.layers.1."  # OpenAI's tensors are reported under transformers' names
    for victim, says in (("visual.transformer.resblocks.1.attn.in_proj_weight", layer + "self_attn.k_proj.weight"),
                         ("visual.transformer.resblocks.1.mlp.c_fc.bias", layer + "mlp.fc1.bias"),
                         ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")):
        lost = {name: shape for name, shape in shapes.items() if name != victim}
        monkeypatch.setattr(clip, "open_official", lambda path, lost=lost: lazy(lost))
        with pytest.raises(ValueError, match=says.replace(".", r"\.")):
            CLIPImage.load("x.pt")
    shapes = {name: tuple(t.shape) for name, t in hugging_face[0].state_dict().items()}
    for victim in (layer + "layer_norm2.weight", "visual_projection.weight",
                   "vision_model.embeddings.position_embedding.weight"):
        refuses(lambda: CLIPImage.load("x"), clip, shapes, victim, monkeypatch)
    monkeypatch.setattr(clip, "open_official", lambda path: lazy({"visual.layer1.0.conv1.weight": (64, 3, 3, 3)}))
    with pytest.raises(ValueError, match="visual.layer1.0.conv1.weight: not a CLIP with a vision transformer"):
        CLIPImage.load("RN50.pt")


@pytest.mark.parametrize("section", [["a list"], "text", 3])
def test_a_configuration_of_another_kind_is_refused_by_file_and_name(tmp_path, section):
    save_file({"vision_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": section}))
    with pytest.raises(ValueError, match=r"config\.json: vision_config is .*, expected an object"):
        read_towers(tmp_path)
