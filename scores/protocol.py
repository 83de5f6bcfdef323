"""One line per figure: how it is measured, without which it can't be compared with another table's."""

from collections.abc import Iterable

INCEPTION = "Fréchet distance of 2048 features of the Inception network of 2015-12-05 (torchmetrics', torch-fidelity's)"
PROTOCOL = {
    "glcm_release": "mean over 64 px patches of the entropy of distinct values in 16 GLCMs, 64 levels of OpenCV's "
                    "gray, radii 1-4, 4 angles: the release's, as in the paper's tables; higher is more texture",
    "glcm_entropy": "mean over 64 px patches and the same 16 GLCMs of -Σ p log2 p, bits: the paper's formula without "
                    "its sign",
    "glcm_symmetric": "glcm_release of symmetric GLCMs and Pillow's gray: PixVerve's, not comparable with the paper's",
    "ratio": "raw RGB bytes / bytes of the JPEG at quality 95, 4:2:0; of a set, of the sums; lower is more detail",
    "grid_16": "dB, power of brightness steps of period 16 px over neighbouring frequencies; of a set, the median",
    "grid_32": "dB, the same of period 32 px",
    "psnr": "dB, of 8-bit RGB, peak 255; of a set, the mean over pictures",
    "ssim": "Gaussian window of 11x11, sigma 1.5, population covariance, each channel of 8-bit RGB; mean over pictures",
    "nmse": "Σ (reference - picture)² / Σ reference², of 8-bit RGB: the paper defines none; mean over pictures",
    "lpips": "VGG-16 with lpips' linear heads, RGB in [-1, 1], at full size; mean over pictures",
    "fid": f"{INCEPTION}; short side resized, centre cropped to a square, then TF1 bilinear to 299 px",
    "rfid": f"{INCEPTION}, of pictures and their reconstructions; squares as they are, TF1 bilinear to 299 px",
    "patch_fid": f"{INCEPTION}, of a grid of 299 px tiles centred in the squares of fid",
    "patch_fid_crops": f"{INCEPTION}, of 20 random 299 px crops of each picture stretched to a square by Lanczos, at "
                       "the same places in the k-th picture of both sets, seed 42: PixVerve's",
    "clip_score": "100 cos of OpenAI's ViT-B/16, from 0; bicubic to 224 px, centre crop; captions cut to 77 tokens",
    "aesthetics": "OpenAI's ViT-L/14 with sac+logos+ava1-l14-linearMSE; bicubic to 224 px, centre crop",
    "prefer": "prompts of the paper's table 11; pictures as JPEG at quality 90, asked in both orders: where these "
              "differ, the pair is undecided. rate: b's share of the decided, its 95 % binomial interval (Wilson)",
    "srcc": "Spearman's correlation of ranks; ties share one",
    "plcc": "Pearson's correlation of values"}
INTERVALS = {
    "bootstrap": "[ ] 95 % interval: percentiles of 2000 bootstrap samples of pictures",
    "halves": "[ ] of a Fréchet distance: 95 % interval from 40 random halves, of what other sets of these N pictures "
              "give; with the bias that N has",
    "unbiased": "_unbiased: extrapolated to infinite N from all pictures and halves of them",
    "wilson": "wins: pictures that score better, ties left out; [ ] 95 % interval of a binomial rate (Wilson)"}


def protocol_of(names: Iterable[str], *intervals: str) -> dict[str, str]:
    """Name -> protocol of the figures that have one, then what their intervals are."""
    names = list(names)
    return {name: PROTOCOL[name] for name in PROTOCOL if name in names} | {name: INTERVALS[name] for name in intervals}


def protocol_lines(protocol: dict[str, str]) -> list[str]:
    return [text if name in INTERVALS else f"{name}: {text}" for name, text in protocol.items()]
