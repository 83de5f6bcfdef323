"""Make the folders of a small SD3 and a small Flux: everything that train_vae.py and train.py do not train.

Mirrors      the layout of the official downloads. CLIP-L and T5 of the Flux folder are links into the SD3 folder
Vocabulary   byte-level BPE (CLIP) and unigram (T5), learnt from the captions by the real libraries
Encoders     official architecture, frozen seeded weights. Queries and keys are small, so attention nearly averages;
             values are large: the vector at the end token is a bag of words, and T5's tokens keep their own word
Transformer  untrained; SD3's position table reaches 4096 px at factor 16
Run          python models/make_tiny.py --data photos --vae runs/vae/vae.safetensors --out runs/tiny-sd3 \\
                 --flux runs/tiny-flux     seconds; the results are model folders for `train.py --weights`
"""

import argparse
import json
import os
import sys
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import Weights, open_weights, save  # noqa: E402
from data import read_folder  # noqa: E402
from files import run_command  # noqa: E402
from flux import FluxConfig, new_flux  # noqa: E402
from mmdit import MMDiTConfig, new_mmdit  # noqa: E402
from text import CLIPText, T5Encoder  # noqa: E402
from tokenizer import CLIP_END, CLIP_START  # noqa: E402

CLIP_MERGES, T5_PIECES = 1800, 1200
CLIP_WIDTHS = {"clip_l": 64, "clip_g": 128}
T5_WIDTH, DEPTH, HEADS = 192, 2, 4
LINKS = {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_3",  # in the Flux folder: in the SD3 folder
         "text_encoder/model.safetensors": "text_encoders/clip_l.safetensors",
         "text_encoder_2/model.safetensors": "text_encoders/t5xxl_fp16.safetensors"}
GAINS = {"q_proj": 0.3, "k_proj": 0.3, "q": 0.1, "k": 0.1, "v_proj": 2.0, "fc2": 0.3, "wo": 0.3}  # others: 1
TABLES = {"token_embedding": 1.0, "embed_tokens": 1.0, "position_embedding": 0.1, "relative_attention_bias": 0.1}
CLIP_LENGTH, T5_LENGTH = 32, 40  # tokens, enough for the captions: padding costs as much time as text


def write_clip_vocabulary(folder: Path, captions: list[str], pad: str) -> int:
    """vocab.json, merges.txt and tokenizer_config.json as CLIP's: bytes, bytes that end a word, merges, start, end."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=CLIP_MERGES, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    splits = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(alphabet)  # "!" comes first, as in CLIP's
    words = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges),
             CLIP_START, CLIP_END]
    config = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": pad,
              "model_max_length": CLIP_LENGTH}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(words)


def write_t5_vocabulary(folder: Path, captions: list[str]) -> int:
    """spiece.model as T5's: pad 0, end 1, unknown 2, pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(folder / "spiece"), vocab_size=T5_PIECES,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "model_max_length": 512}, indent=1))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).get_piece_size()


def seeded(encoder: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of a frozen encoder: embeddings 1, queries and keys small, values as large as the words, quiet MLPs."""
    for name, parameter in encoder.named_parameters():
        leaf = name.split(".")[-2]
        if parameter.ndim == 1:  # biases are 0, scales of norms 1
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        else:
            std = TABLES.get(leaf, GAINS.get(leaf, 1.0) * parameter.shape[1] ** -0.5)
            nn.init.normal_(parameter, std=std, generator=generator)
    return {name: t.half() for name, t in encoder.state_dict().items()}


def write_encoders(folder: Path, vocabulary: int, pieces: int, seed: int, generator: torch.Generator) -> None:
    """The three text encoders, for vocabularies of these sizes."""
    folder.mkdir(exist_ok=True)
    for (name, width), activation in zip(CLIP_WIDTHS.items(), ("quick_gelu", "gelu"), strict=True):
        projection, end = width if name == "clip_g" else None, vocabulary - 1
        clip = CLIPText(vocabulary, CLIP_LENGTH, width, width, DEPTH, HEADS, activation, end, projection)
        save(folder / f"{name}.safetensors", seeded(clip, generator),
             {"num_attention_heads": HEADS, "hidden_act": activation, "eos_token_id": end, "seed": seed})
    t5 = seeded(T5Encoder(pieces, T5_WIDTH, T5_WIDTH, T5_WIDTH, DEPTH, (32, HEADS)), generator)
    save(folder / "t5xxl_fp16.safetensors", t5, {"length": T5_LENGTH, "seed": seed})


def write_sd3(folder: Path, vae: Weights, generator: torch.Generator) -> int:
    """sd3.safetensors, the transformer and the VAE in one file; returns the number of parameters to train."""
    transformer = new_mmdit(MMDiTConfig(
        hidden_size=256, depth=4, context_dim=T5_WIDTH, pooled_dim=sum(CLIP_WIDTHS.values()), table_side=128,
        mlp_hidden=1024, qk_norm=True), generator)
    tensors = {f"model.diffusion_model.{name}": t.half() for name, t in transformer.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": t.read().half() for name, t in vae.items()}
    save(folder / "sd3.safetensors", tensors, vae.metadata | {"steps": 28, "cfg": 2.0, "time_shift": 3.0, "res": 1024})
    return sum(p.numel() for p in transformer.parameters())


def write_flux(folder: Path, sd3: Path, vae: Weights, generator: torch.Generator) -> int:
    """A Flux folder with relative links into the SD3 folder; returns the number of parameters to train."""
    for link, shared in LINKS.items():
        link = folder / link
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(sd3 / shared, link.parent))
    save(folder / "ae.safetensors", {name: t.read().half() for name, t in vae.items()}, vae.metadata)
    transformer = new_flux(FluxConfig(
        hidden_size=256, depth=2, depth_single=4, head_dim=64, context_dim=T5_WIDTH, pooled_dim=CLIP_WIDTHS["clip_l"],
        mlp_hidden=1024, axes_dim=(8, 28, 28)), generator)
    save(folder / "flux.safetensors", {name: t.half() for name, t in transformer.state_dict().items()},
         {"axes_dim": "8, 28, 28", "steps": 28, "guidance": 3.5, "res": 1024})
    return sum(p.numel() for p in transformer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folders of a small SD3 and a small Flux.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder whose captions give the vocabularies")
    add("--vae", required=True, metavar="FILE", help="autoencoder written by train_vae.py")
    add("--out", default="runs/tiny-sd3", metavar="DIR", type=Path, help="SD3 folder to write")
    add("--flux", metavar="DIR", type=Path, help="Flux folder to write as well, with links to --out")
    add("--seed", type=int, default=0, help="of encoders and transformers")
    args = parser.parse_args()
    captions = [caption for item in read_folder(args.data) for caption in item.captions]
    generator, vae = torch.Generator().manual_seed(args.seed), open_weights(args.vae)

    vocabulary = write_clip_vocabulary(args.out / "tokenizer", captions, pad=CLIP_END)
    write_clip_vocabulary(args.out / "tokenizer_2", captions, pad="!")
    pieces = write_t5_vocabulary(args.out / "tokenizer_3", captions)
    write_encoders(args.out / "text_encoders", vocabulary, pieces, args.seed, generator)
    parameters = write_sd3(args.out, vae, generator)
    print(f"{args.out}: CLIP vocabulary {vocabulary}, T5 vocabulary {pieces}, {parameters:,} parameters to train")
    if args.flux:
        print(f"{args.flux}: {write_flux(args.flux, args.out, vae, generator):,} parameters to train")


if __name__ == "__main__":
    run_command(main)
