"""Quality of scans beside their rivals, each at its own best: searched alike, equal parameters, equal measured time.

    python -m benchmarks.quality --data digits fashion --plan
    python -m benchmarks.quality --data digits fashion --jobs 2 --hours 24 --out benchmarks/results/quality.json

For every contender and data set, on seeds that are not scored: a geometric grid of learning rates, extended until the
best lies inside; settings of its own options, as many for all, by successive halving; a grid for what was chosen, and
rates around the best at the next budget. Scored are paired seeds at three budgets, at equal time and at equal steps.
Time is the processor's, on one thread, of steps that all contenders take in turn; steps are fixed from it before the
first scored cell, and it is measured again after the last. Ratios of ours to each rival are paired by seed, their
p-values corrected for the whole table (Holm). What does not fit into --hours is dropped by parts, never by seeds, and
said. A study can be stopped and started again: what is done is kept, what was interrupted resumes. Data sets that were
studied before, on another machine perhaps, are put into the same table by --beside.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import scoring
from benchmarks.contenders import CONTENDERS, fitted
from benchmarks.contest import study_of
from benchmarks.output import publish
from benchmarks.presets import PRESETS
from benchmarks.protocol import FACTOR, KINDS, UNWANTED, Field, Part, Protocol, as_json, fit_into, part_name, parts
from benchmarks.second_look import read_study
from benchmarks.study import check_jobs_and_places, holm, interval, once, paired_p, paired_ratio
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import write_whole

# -- what it shows ---------------------------------------------------------------------------------------------------


def comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratio of ours to each rival, for every data set, budget and kind, with p-values for all together.

    Seeds of which one of both diverged are left out of a ratio, and counted; None where none is left.
    """
    table = []
    for data, budget, kind in dict.fromkeys((row["data"], row["budget"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["data"], row["budget"], row["kind"]) == (data, budget, kind)]
        there = list(dict.fromkeys(row["variant"] for row in own))
        finite = [row for row in own if not row["diverged"]]
        for ours in (name for name in there if CONTENDERS[name].ours):
            for rival in (name for name in there if not CONTENDERS[name].ours):
                entry: dict[str, Any] = {"data": data, "budget": budget, "kind": kind, "ours": ours, "rival": rival}
                entry["diverged"] = sum(row["diverged"] for row in own if row["variant"] in (ours, rival))
                pairs = {row["seed"] for row in finite if row["variant"] == ours}
                pairs &= {row["seed"] for row in finite if row["variant"] == rival}
                for metric in ("fd", "val_loss"):
                    entry[metric] = paired_ratio(finite, metric, ours, rival) if pairs else None
                table.append(entry | {"p": paired_p(finite, "fd", ours, rival)})
    for entry, corrected in zip(table, holm([entry["p"] for entry in table]), strict=True):
        entry["p_holm"] = corrected
    return table


def curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each contender's mean figures with intervals, by data set, kind and budget."""
    points = dict.fromkeys((row["data"], row["kind"], row["variant"], row["budget"]) for row in rows)
    found = []
    for data, kind, variant, budget in points:
        own = [row for row in rows if (row["data"], row["kind"], row["variant"]) == (data, kind, variant)]
        own = [row for row in own if row["budget"] == budget and not row["diverged"]]
        there = [metric for metric in scoring.METRICS if all(metric in row for row in own)] if own else []
        means = {metric: interval([row[metric] for row in own]) for metric in there}
        found.append({"data": data, "kind": kind, "variant": variant, "budget": budget, "seeds": len(own), **means})
    return found


def scored_rows(results: Mapping[str, Any], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """Return the scored cells of data sets in the order of a table, each with every budget and kind it was for."""
    rows = []
    for data, found in results.items():
        order = list(found["search"])
        cells = sorted(found["cells"], key=lambda cell: (cell["seed"], order.index(cell["variant"])))
        for budget, kind in itertools.product(budgets, KINDS):
            of = {"data": data, "budget": budget, "kind": kind}
            rows += [{**cell, **of} for cell in cells if part_name(budget, kind) in cell["for"]]
    return rows


def settings_of(protocol: Protocol) -> dict[str, Any]:
    """Return what all data sets of a study share, as JSON has it."""
    settings = {"protocol": asdict(protocol), "setting": scoring.SETTING}
    return dict(json.loads(json.dumps(settings)))


def study(
    fields: Sequence[Field], protocol: Protocol, kept: Sequence[Part], dropped: Sequence[Part], work: Path, jobs: int
) -> dict[str, Any]:
    """Run every cell that is not there yet, and return what was found by data set."""
    from benchmarks.measure import CpuDevice, software

    if settings_of(protocol) != once(work / "protocol.json", lambda: settings_of(protocol)):
        raise UserError(f"{work} holds a study of another protocol; give another --work, or delete it")
    nets = {}
    for field in fields:
        field.data.check()  # the last one's images and features, too, before hours of the first one's trainings
        nets[field.data.name] = judging_net(field.data, work)
    results = {}
    for field in fields:
        own = {
            name: [part for part in parts if part.data == field.data.name]
            for name, parts in (("kept", kept), ("dropped", dropped))
        }
        results[field.data.name] = {
            "net": nets[field.data.name],
            **study_of(field, protocol, {part.name for part in own["kept"]}, work, jobs),
            "plan": {name: [as_json(part) for part in parts] for name, parts in own.items()},
            "machine": CpuDevice().describe(),
            "software": software(),
        }
    return results


def judging_net(data: scoring.DataSet, work: Path) -> dict[str, Any]:
    """Return a data set's feature extractor; raises UserError where a study in this directory has another."""
    net, file = data.net(), work / data.name / "net.json"
    if net != (earlier := once(file, lambda: net)):
        raise UserError(
            f"--features of {data.name} is {data.features}, but {work} holds scores by {earlier['score']} with "
            f"SHA-256 {earlier['sha256'][:12]}…; give that feature extractor, or another --work"
        )
    return net


def tabulated(protocol: Protocol, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study: what was found by data set, from the fewest tokens on, compared over all of them."""
    results = dict(sorted(results.items(), key=lambda item: item[1]["tokens"]))
    rows = scored_rows(results, protocol.budgets)
    contenders = dict.fromkeys(name for found in results.values() for name in found["search"])
    return dict(
        without_nan(
            {
                **settings_of(protocol),
                "factor_of_rates": FACTOR,
                "contenders": {name: asdict(CONTENDERS[name]) for name in contenders},
                "data": results,
                "comparisons": comparisons(rows),
                "curves": curves(rows),
            }
        )
    )


def beside(file: Path | None, protocol: Protocol) -> tuple[Protocol, dict[str, Any]]:
    """Return the protocol of both an earlier study and this one, and what the earlier one found, by data set.

    One may have larger budgets than the other, which are then for its data sets alone.

    Raises:
        UserError: the earlier study is by another protocol.
    """
    if file is None:
        return protocol, {}
    found = read_study(file, "--beside")
    own = settings_of(protocol)
    earlier = {"budgets": [], **found["protocol"]}
    shorter, longer = sorted((earlier, own["protocol"]), key=lambda settings: len(settings["budgets"]))
    of_both = {"budgets": longer["budgets"][: len(shorter["budgets"])], "widest": None}
    if {**shorter, "widest": None} != {**longer, **of_both} or found.get("setting") != own["setting"]:
        raise UserError(f"--beside {file} is a study by another protocol; its figures cannot share a table with these")
    return Protocol(**{**longer, "budgets": tuple(longer["budgets"])}), dict(found["data"])


def without_nan(tree: Any) -> Any:
    """Return JSON values with null for what is no finite number, such as the interval of one pair."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


# -- command ---------------------------------------------------------------------------------------------------------


def show_plan(kept: Sequence[Part], dropped: Sequence[Part], jobs: int, say: Callable[[str], Any] = print) -> None:
    """Print every part of a plan, what is dropped, and the hours."""
    for part in kept:
        say(f"{part.data:16} {part.name:38} {part.cells:5} cells of {part.seconds:7.0f} s {part.hours:8.2f} core hours")
    for part in dropped:
        say(f"{part.data:16} {part.name:38} {part.cells:5} cells dropped, {part.hours:.2f} core hours")
    cells, hours = sum(part.cells for part in kept), sum(part.hours for part in kept) / jobs
    say(f"{cells} cells, {hours:.1f} hours of {jobs} cores; seeds are not dropped")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a study that is ready to run; options change it")
    scoring.add_data_options(parser, tuple(scoring.DATA_SETS), several=True)
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME=A,B", help="contenders of one data set")
    parser.add_argument("--size", default=Protocol.size, help="preset of all models, such as N or T")
    parser.add_argument("--seeds", type=int, default=Protocol.seeds, help="scored and paired, from 0 on")
    parser.add_argument("--search-seeds", type=int, default=Protocol.search_seeds, help="that choose, from 100 on")
    parser.add_argument("--rates", type=int, default=Protocol.rates, help="learning rates of a grid, odd")
    parser.add_argument("--trials", type=int, default=Protocol.trials, help="settings of options of each contender")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(Protocol.budgets), help="multiples of --seconds")
    parser.add_argument("--widest", help="the data set of the largest budgets; default: the first of --data")
    parser.add_argument("--finalists", type=int, default=Protocol.finalists, help="for the largest budgets")
    parser.add_argument("--seconds", nargs="+", default=[], metavar="NAME=S", help="of the smallest budget")
    parser.add_argument("--drop", nargs="+", choices=tuple(UNWANTED), default=[], help="parts to do without")
    parser.add_argument("--hours", type=float, default=12, help="what does not fit is dropped, by parts")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--plan", action="store_true", help="say what would run and how long, and run nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/fair"), help="where the cells live")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--beside", type=Path, metavar="JSON", help="an earlier study by the same protocol, of which "
                        "other data sets stay in the result")  # fmt: skip
    return parser


def _options(arguments: Sequence[str]) -> Any:
    """Return the options; a preset's words come first, so that what is given besides changes them."""
    options = _parser().parse_args(arguments)
    return options if options.preset is None else _parser().parse_args([*PRESETS[options.preset].words, *arguments])


def fields_of(options: Any) -> list[Field]:
    """Return the data sets, each with its seconds and its contenders; raises UserError."""
    chosen = scoring.with_seconds(scoring.chosen(options), options.seconds)
    names = [one.name for one in chosen]
    only = scoring.by_name(names, "--only", options.only)
    fields = []
    for one in chosen:
        given = only[one.name].split(",") if one.name in only else options.contenders
        if unknown := [name for name in given if name not in CONTENDERS]:
            raise UserError(f"--only names {unknown[0]}, but contenders are {', '.join(CONTENDERS)}")
        if CONTENDERS[given[0]].ours:
            flag = "--only" if one.name in only else "--contenders"
            raise UserError(f"{flag} begins with {given[0]}, but the first is what others are measured by; put a rival")
        fields.append(Field(one, tuple(dict.fromkeys(given))))
    return fields


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan a study, or run it."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    fields = fields_of(options)
    if options.widest not in (None, *(field.data.name for field in fields)):
        raise UserError(f"--widest is {options.widest}, but must be one of --data: {', '.join(options.data)}")
    check_jobs_and_places(options)
    names = ("size", "seeds", "search_seeds", "rates", "trials", "finalists")
    widest = (options.widest or fields[0].data.name) if len(options.budgets) > 2 else None
    given = {name: getattr(options, name) for name in names}
    protocol = Protocol(budgets=tuple(options.budgets), widest=widest, **given)
    for field in fields:  # a setting too few, or parameters that cannot be equal, is told before anything runs
        for name in field.contenders:
            for setting in CONTENDERS[name].settings(protocol.trials):
                fitted(name, setting, field.data, protocol.size)
    of_both, earlier = beside(options.beside, protocol)
    kept, dropped = fit_into(parts(protocol, fields), options.hours, options.jobs, options.drop)
    if options.preset is not None:
        print(PRESETS[options.preset].reason)
    show_plan(kept, dropped, options.jobs)
    if options.plan:
        return
    found = study(fields, protocol, kept, dropped, options.work, options.jobs)
    publish(tabulated(of_both, {**earlier, **found}), options.work / "study.json", ("comparisons",))
    if options.out:
        write_whole(options.out, (options.work / "study.json").read_bytes())


if __name__ == "__main__":
    run_cli(main)
