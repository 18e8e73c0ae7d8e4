"""How a mistake reaches the person who made it: one line, exit code 2, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest

from gspn_dit.errors import ArgumentParser, LocalUserError, UserError, nearest, run_cli


def fail_with(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def report(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, standard output and standard error of a command line that raises `error`."""
    with pytest.raises(SystemExit) as caught:
        run_cli(fail_with(error))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/sample.py", "--flag"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.delenv("RANK", raising=False)


def test_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(UserError("no such class"), capsys) == (2, "", "sample.py: error: no such class\n")


def test_lines_and_runs_of_spaces_become_one_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(UserError("first\n   second\t\tthird\n"), capsys)[2] == "sample.py: error: first second third\n"


def test_a_module_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("fid.__main__", None))
    assert report(UserError("wrong"), capsys)[2] == "fid: error: wrong\n"


def test_rank_0_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert report(UserError("wrong"), capsys) == (2, "", "sample.py: error: wrong\n")


def test_other_ranks_are_silent_but_exit_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert report(UserError("wrong"), capsys) == (2, "", "")


def test_what_one_process_alone_meets_is_printed_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert report(LocalUserError("unreadable"), capsys) == (2, "", "sample.py: error: unreadable\n")


def test_nothing_happens_without_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    called = []
    run_cli(lambda: called.append(1))
    assert called == [1]
    assert capsys.readouterr() == ("", "")


def test_defects_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(fail_with(ZeroDivisionError()))


def test_interrupt_exits_with_130_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(KeyboardInterrupt(), capsys) == (130, "", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_unwinds_and_says_what_is_left(name: str) -> None:
    code = (
        "import os, signal\nfrom gspn_dit.errors import run_cli\n"
        "def main():\n    try: os.kill(os.getpid(), signal.{0})\n    finally: print('tidied')\n"
        "run_cli(main, 'continue with --resume')"
    )
    done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.Signals[name], "tidied\n")
    assert done.stderr == f"-c: stopped by {name}; continue with --resume\n"


def test_a_second_signal_kills() -> None:
    code = (
        "import os, signal, time\nfrom gspn_dit.errors import run_cli\n"
        "def main():\n    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "run_cli(main)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM


def test_signals_are_left_to_a_job_of_several_processes_and_to_nohup() -> None:
    code = (
        "import os, signal\nfrom gspn_dit.errors import run_cli\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "def main(): os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGTERM)\nrun_cli(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "WORLD_SIZE": "2"})
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("lines", [3, 100_000])  # that are written when Python ends, or before
def test_output_that_nobody_reads_any_more_ends_a_command_quietly(lines: int) -> None:
    code = (
        "import sys\nfrom gspn_dit.errors import run_cli\n"
        f"def main():\n    sys.stdin.read()\n    for _ in range({lines}): print('line')\n    sys.exit(0)\nrun_cli(main)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as started:
        assert started.stdin and started.stdout and started.stderr
        started.stdout.close()
        started.stdin.close()
        assert started.stderr.read() == b""
    assert started.returncode == 128 + signal.SIGPIPE


def test_another_pipe_that_breaks_keeps_its_traceback() -> None:
    with pytest.raises(BrokenPipeError):
        run_cli(fail_with(BrokenPipeError()))


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_in_a_process_of_its_own(rank: str | None, lines: int) -> None:
    code = "from gspn_dit.errors import *\ndef main(): raise UserError('wrong')\nrun_cli(main)"
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    if rank is not None:
        environment["RANK"] = rank
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.splitlines() == ["-c: error: wrong"] * lines


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("batch_sise", "; did you mean 'batch_size'?"),
        ("ba", "; did you mean 'batch_size'?"),  # what a word abbreviates comes before what it resembles
        ("se", "; did you mean 'seed'?"),
        ("steps", "; did you mean 'max_steps'?"),
        ("seed", "; did you mean 'seed'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest_names_the_closest_word_or_none(word: str, hint: str) -> None:
    assert nearest(word, iter(["max_steps", "seed", "batch_size"])) == hint


@pytest.mark.parametrize("word", ["lr", "training.lr"])
def test_nearest_knows_initials(word: str) -> None:
    keys = ["training.log_every", "training.learning_rate", "seed"]
    assert nearest(word, keys) == "; did you mean 'training.learning_rate'?"


def test_nearest_of_nothing() -> None:
    assert nearest("word", []) == ""


def test_nearest_takes_the_shortest_of_several_that_a_word_abbreviates() -> None:
    assert nearest("--per", ["--order", "--per-class-and-more", "--per-class"]) == "; did you mean '--per-class'?"
    assert nearest("--", ["--order"]) == ""


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--per-class", type=int, default=8, help="images per class")
    parser.add_argument("--order", choices=("grouped", "interleaved"))
    return parser


def refusal(parser: ArgumentParser, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parser.parse_args(list(arguments))
    return str(caught.value)


def test_parser_takes_whole_names(parser: ArgumentParser) -> None:
    assert parser.parse_args(["--per-class", "3"]).per_class == 3
    assert parser.parse_args(["--per-class=4"]).per_class == 4


@pytest.mark.parametrize("given", ["--per", "--per-clas", "--per-clas=3"])
def test_parser_refuses_abbreviations_and_names_the_argument(parser: ArgumentParser, given: str) -> None:
    word = given.split("=")[0]
    assert refusal(parser, given) == f"unknown argument {word}; did you mean '--per-class'?"


def test_parser_reports_mistakes_as_user_errors(parser: ArgumentParser) -> None:
    assert refusal(parser, "--qqqqqq") == "unknown argument --qqqqqq"
    assert refusal(parser, "stray") == "unknown argument stray"
    assert refusal(parser, "--per-class", "many") == "argument --per-class: invalid int value: 'many'"
    assert refusal(parser, "--per-class") == "argument --per-class: expected one argument"
    assert "invalid choice: 'random'" in refusal(parser, "--order", "random")


def test_help_shows_defaults_and_exits_with_0(parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    assert "images per class (default: 8)" in capsys.readouterr().out
