"""Evaluate a classifier: top-1 and top-5, each class, what is taken for what, as text, JSON and a page.

python -m gspn_dit.evaluate --checkpoint RUN --out report
python -m gspn_dit.evaluate --checkpoint RUN --data imagefolder:DIR --split all --out report
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import cannot_hold, write_whole
from gspn_dit.paths import path_argument, source_argument

if TYPE_CHECKING:
    from gspn_dit.classifier import ImageClassifier
    from gspn_dit.data.images import ImageSet
    from gspn_dit.tasks.mistakes import Answers

FILES = ("report.json", "index.html")
FORMAT_VERSION = 1
SHOWN_CONFUSIONS = 10
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }
:root { color-scheme: light dark; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; background: white; }
"""


def build_parser() -> ArgumentParser:
    """The arguments of `python -m gspn_dit.evaluate`."""
    parser = ArgumentParser(prog="python -m gspn_dit.evaluate", description="Evaluate a classifier.")
    parser.add_argument("--checkpoint", type=path_argument, required=True, help="run directory, or a checkpoint of it")
    parser.add_argument(
        "--data",
        type=source_argument,
        help="imagefolder:DIR, hf:NAME_OR_DIR or digits, whose classes are found by name; default: the run's own",
    )
    parser.add_argument("--split", choices=("validation", "train", "all"), default="validation", help="which images")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged, or of the last step")
    parser.add_argument("--out", type=path_argument, help="directory of report.json and index.html; default: none")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")
    parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1, …")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Check what was asked for, classify, print and write."""
    options = build_parser().parse_args(arguments)
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    if options.out:
        check_out(Path(options.out), options.overwrite)
    from gspn_dit.classifier import ImageClassifier

    classifier = ImageClassifier.from_checkpoint(options.checkpoint, options.weights)
    move(classifier, options.device)
    images = open_images(classifier, options.data, options.split)
    report, picture = evaluate(classifier, images, options.batch_size)
    report |= {"split": options.split, "checkpoint": str(options.checkpoint), "weights": options.weights}
    print(summary(report))
    if options.out:
        write_report(Path(options.out), report, picture)
        print(f"report: {options.out}")


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a place that cannot hold a report, or holds something else."""
    if problem := cannot_hold(out):
        raise UserError(f"--out {problem}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if foreign := [name for name in found if name not in FILES]:
        raise UserError(f"--out {out} holds something besides a report ({', '.join(foreign[:3])}); give another")
    if found and not overwrite:
        raise UserError(f"--out {out} is not empty; give --overwrite to replace the report in it")


def move(classifier: ImageClassifier, device: str) -> None:
    """Put a classifier on a device; raises UserError where there is none."""
    try:
        classifier.model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here: {reason}") from None


def open_images(classifier: ImageClassifier, source: str | None, split: str) -> ImageSet:
    """Open what is to be classified; raises UserError for what is not there, or has classes that are not known."""
    import dataclasses

    from gspn_dit.data.images import load_images, open_source

    part, data = None if split == "all" else split, classifier.config.data
    fraction = data.validation_fraction
    if source is None:
        images = load_images(data.name, data.path, part, data.image_size, fraction, classifier.channels)
    else:
        images = open_source(source, part, None, classifier.channels, fraction)
        if images.image_size != classifier.image_size:
            images = open_source(source, part, classifier.image_size, classifier.channels, fraction)
    classifier.check_classes(images)
    return dataclasses.replace(images, channels=classifier.channels)


def evaluate(classifier: ImageClassifier, images: ImageSet, batch_size: int = 256) -> tuple[dict[str, Any], bytes]:
    """Return the content of report.json, and a PNG of confusions and mistakes."""
    from gspn_dit.environment import describe_run
    from gspn_dit.tasks.mistakes import Answers, classify, mistakes_picture

    data, rows = classifier.batches(images), range(len(images))
    found = classify(classifier.model, data, rows, classifier.device, batch_size)
    labels = classifier.check_classes(images)[found.labels]
    answers = Answers(found.probabilities, labels, classifier.class_names)
    return {
        "format_version": FORMAT_VERSION,
        "data": images.name,
        "images": len(images),
        "step": classifier.manifest["step"],
        "model": classifier.manifest["model"],
        "scores": scores(answers),
        "classes": answers.per_class(),
        "confusions": confusions(answers),
        "environment": describe_run(),
    }, mistakes_picture(answers, data, rows)


def scores(answers: Answers) -> dict[str, Any]:
    """Return top-1 and top-5 with 95% intervals (Wilson's), and the cross-entropy in nats."""
    from gspn_dit.tasks.mistakes import wilson

    found: dict[str, Any] = {"loss": answers.loss}
    for name, count in (("top1", 1), ("top5", 5)):
        share = answers.top(count)
        low, high = wilson(share, len(answers.labels))
        found[name] = {"share": share, "low": low, "high": high}
    return found


def confusions(answers: Answers) -> list[dict[str, Any]]:
    """Return the most frequent mistakes: class, what it is taken for, and how often."""
    wrong, names = answers.confusion.copy(), answers.class_names
    for k in range(len(names)):
        wrong[k, k] = 0
    order = (-wrong).flatten().argsort(kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in order]
    return [{"class": names[a], "taken_for": names[b], "images": int(wrong[a, b])} for a, b in pairs if wrong[a, b]]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}%"


def _score_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (title, f"{_percent(score['share'])}  [{_percent(score['low'])}, {_percent(score['high'])}]")
        for title, score in (("top-1", report["scores"]["top1"]), ("top-5", report["scores"]["top5"]))
    ]
    return [*rows, ("cross-entropy", f"{report['scores']['loss']:.4f}")]


def summary(report: dict[str, Any]) -> str:
    """Return the report for a terminal."""
    head = f"{report['images']:,} images of '{report['data']}', {report['split']}; step {report['step']:,}"
    rows = [*_score_rows(report), *((f"recall of {c['class']}", _percent(c["recall"])) for c in report["classes"][:20])]
    lines = [f"{name:<28}{value}" for name, value in rows]
    lines += [f"{c['images']:>5} of {c['class']} are taken for {c['taken_for']}" for c in report["confusions"][:5]]
    return "\n".join([head, *lines])


def write_report(out: Path, report: dict[str, Any], picture: bytes) -> None:
    """Write report.json and index.html, each complete or as it was; raises UserError where the disk refuses."""
    try:
        write_whole(out / "index.html", page(report, picture).encode())
        write_whole(out / "report.json", (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}") from None


def page(report: dict[str, Any], picture: bytes) -> str:
    """Return the report as one HTML page that needs nothing but itself."""

    def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"

    classes = [
        (c["class"], f"{c['images']:,}", _percent(c["recall"]), _percent(c["precision"])) for c in report["classes"]
    ]
    mistaken = [(c["class"], c["taken_for"], f"{c['images']:,}") for c in report["confusions"]]
    title = html.escape(f"{report['data']}: top-1 {_percent(report['scores']['top1']['share'])}")
    encoded = base64.b64encode(picture).decode()
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1><p>{report['images']:,} images ({html.escape(report['split'])}), "
        f"{html.escape(report['checkpoint'])}, step {report['step']:,}, {report['weights']} weights. "
        "In brackets 95% intervals.</p>"
        f"{table(('score', 'value'), _score_rows(report))}"
        f'<img alt="confusion table and worst mistakes" src="data:image/png;base64,{encoded}">'
        f"<h2>Most frequent mistakes</h2>{table(('class', 'taken for', 'images'), mistaken)}"
        f"<h2>Classes</h2>{table(('class', 'images', 'recall', 'precision'), classes)}</body></html>\n"
    )


if __name__ == "__main__":
    run_cli(main, "no report was written")
