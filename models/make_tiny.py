"""Make models/tiny-sd3/ and models/tiny-flux/: everything of a small SD3 and Flux that is not trained by train_vae.py and train.py.

Mirrors     the official downloads
              SD3   sd3*.safetensors, text_encoders/{clip_l,clip_g,t5xxl_fp16}.safetensors, tokenizer*/
              Flux  flux*.safetensors, ae.safetensors, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/
            CLIP-L, T5 and their vocabularies are the same in both: the Flux folder has relative links into the SD3 folder beside it
Vocabulary  byte-level BPE (CLIP) and unigram (T5), learnt from the captions by the real libraries
Encoders    CLIP-L, CLIP-G and T5 of the official architecture, with frozen seeded weights. They are not trained: queries and
            keys are small, so that attention is nearly an average over the prompt, and values are large, so that the vector
            at the end token is a bag of the prompt's words; T5's tokens keep their own word and a little of their neighbours.
Transformer untrained. SD3: hidden_size 256, depth 4; a position table of 128 x 128 patches reaches 4096 px at factor 16
            Flux: hidden_size 256 with 4 heads of 64, 2 double and 4 single blocks, a guidance input
Run         python models/make_tiny.py --data photos --vae runs/vae/vae.safetensors --out runs/tiny-sd3 --flux runs/tiny-flux
            takes seconds; the results are model folders for `train.py --weights`
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
from flux import FluxConfig, new_flux  # noqa: E402
from mmdit import MMDiTConfig, new_mmdit  # noqa: E402
from text import CLIPText, T5Encoder  # noqa: E402
from tokenizer import CLIP_END, CLIP_START  # noqa: E402

CLIP_MERGES, T5_PIECES = 1800, 1200
CLIP_WIDTHS = {"clip_l": 64, "clip_g": 128}
T5_WIDTH, DEPTH, HEADS = 192, 2, 4
LINKS = {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_3", "text_encoder/model.safetensors": "text_encoders/clip_l.safetensors",
         "text_encoder_2/model.safetensors": "text_encoders/t5xxl_fp16.safetensors"}  # in the Flux folder: in the SD3 folder
CLIP_LENGTH, T5_LENGTH = 32, 40  # tokens, enough for the captions: padding costs as much time as text


def write_clip_vocabulary(folder: Path, captions: list[str], pad: str) -> int:
    """vocab.json, merges.txt and tokenizer_config.json as CLIP's: bytes, bytes that end a word, merges, start, end."""
    trainer = trainers.BpeTrainer(vocab_size=CLIP_MERGES, end_of_word_suffix="</w>", initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learnt.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" comes first, as in CLIP's
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(a + b for a, b in merges), CLIP_START, CLIP_END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END,
                                                              "pad_token": pad, "model_max_length": CLIP_LENGTH}, indent=1))
    return len(words)


def write_t5_vocabulary(folder: Path, captions: list[str]) -> int:
    """spiece.model as T5's: pad 0, end 1, unknown 2, pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(folder / "spiece"), vocab_size=T5_PIECES, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "model_max_length": 512}, indent=1))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).get_piece_size()


def seeded(encoder: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of a frozen encoder: embeddings 1, queries and keys small, values as large as the words, quiet MLPs."""
    for name, parameter in encoder.named_parameters():
        leaf = name.split(".")[-2]
        if "norm" in leaf:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif leaf in ("token_embedding", "embed_tokens"):
            nn.init.normal_(parameter, generator=generator)
        elif leaf in ("position_embedding", "relative_attention_bias"):
            nn.init.normal_(parameter, std=0.1, generator=generator)
        else:
            gain = {"q_proj": 0.3, "k_proj": 0.3, "q": 0.1, "k": 0.1, "v_proj": 2.0, "fc2": 0.3, "wo": 0.3}.get(leaf, 1.0)
            nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5, generator=generator)
    return {name: t.half() for name, t in encoder.state_dict().items()}


def write_flux(folder: Path, sd3: Path, vae: Weights, pooled_dim: int, generator: torch.Generator) -> int:
    """A Flux folder beside the SD3 folder; what both share are relative links. Returns the number of parameters to train."""
    for link, shared in LINKS.items():
        link = folder / link
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(sd3 / shared, link.parent))
    save(folder / "ae.safetensors", {name: t.read().half() for name, t in vae.items()}, vae.metadata)
    config = FluxConfig(hidden_size=256, depth=2, depth_single=4, head_dim=64, context_dim=T5_WIDTH, pooled_dim=pooled_dim, mlp_hidden=1024,
                        axes_dim=(8, 28, 28))
    transformer = new_flux(config, generator)
    save(folder / "flux.safetensors", {name: t.half() for name, t in transformer.state_dict().items()},
         {"axes_dim": "8, 28, 28", "steps": 28, "guidance": 3.5, "res": 1024})
    return sum(p.numel() for p in transformer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder whose captions give the vocabularies")
    parser.add_argument("--vae", required=True, metavar="FILE", help="what train_vae.py wrote")
    parser.add_argument("--out", default="runs/tiny-sd3", metavar="DIR", help="model folder to write")
    parser.add_argument("--flux", metavar="DIR", help="Flux folder to write as well, with links to --out")
    parser.add_argument("--seed", type=int, default=0, help="of encoders and transformers")
    args = parser.parse_args()
    out, generator = Path(args.out), torch.Generator().manual_seed(args.seed)
    captions = [caption for item in read_folder(args.data) for caption in item.captions]

    vocabulary = [write_clip_vocabulary(out / name, captions, pad) for name, pad in (("tokenizer", CLIP_END), ("tokenizer_2", "!"))][0]
    pieces = write_t5_vocabulary(out / "tokenizer_3", captions)
    (out / "text_encoders").mkdir(exist_ok=True)
    for (name, width), activation in zip(CLIP_WIDTHS.items(), ("quick_gelu", "gelu"), strict=True):
        projection = width if name == "clip_g" else None
        clip = CLIPText(vocabulary, CLIP_LENGTH, width, width, DEPTH, HEADS, activation, vocabulary - 1, projection)
        save(out / "text_encoders" / f"{name}.safetensors", seeded(clip, generator),
             {"num_attention_heads": HEADS, "hidden_act": activation, "eos_token_id": vocabulary - 1, "seed": args.seed})
    t5 = T5Encoder(pieces, T5_WIDTH, T5_WIDTH, T5_WIDTH, DEPTH, (32, HEADS))
    save(out / "text_encoders" / "t5xxl_fp16.safetensors", seeded(t5, generator), {"length": T5_LENGTH, "seed": args.seed})

    config = MMDiTConfig(hidden_size=256, depth=4, context_dim=T5_WIDTH, pooled_dim=sum(CLIP_WIDTHS.values()), table_side=128,
                         mlp_hidden=1024, qk_norm=True)
    transformer, vae = new_mmdit(config, generator), open_weights(args.vae)
    tensors = {f"model.diffusion_model.{name}": t.half() for name, t in transformer.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": t.read().half() for name, t in vae.items()}
    save(out / "sd3.safetensors", tensors, vae.metadata | {"steps": 28, "cfg": 2.0, "time_shift": 3.0, "res": 1024})
    print(f"{out}: CLIP vocabulary {vocabulary}, T5 vocabulary {pieces}, "
          f"{sum(p.numel() for p in transformer.parameters()):,} parameters to train")
    if args.flux:
        flux_parameters = write_flux(Path(args.flux), out, vae, CLIP_WIDTHS["clip_l"], generator)
        print(f"{args.flux}: {flux_parameters:,} parameters to train")


if __name__ == "__main__":
    main()
