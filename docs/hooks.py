"""What the site has beyond docs/: pages from files at the root, links to sources, and the reference from docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "cuda/README.md": "kernels.md",
    "examples/README.md": "examples.md",
}
"""Files of the repository that are pages of the site, and the page's name."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
ROOMS = {
    "gspn_dit": "The package",
    **{f"gspn_dit.{name}": f"gspn_dit.{name}" for name in ("ops", "models", "diffusion", "data", "config", "tasks")},
    **{
        f"gspn_dit.{name}": f"gspn_dit.{name}"
        for name in ("training", "sweep", "playground", "highres", "prepare", "importers")
    },
    "fid": "fid",
}
"""The packages that have a page of the reference each, and its title."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for package, title in ROOMS.items():
        files.append(File.generated(config, f"reference/{page_of(package)}", content=reference(package, title)))
    return files


def page_of(package: str) -> str:
    """The file of a package's page."""
    return "index.md" if package == "gspn_dit" else f"{package.removeprefix('gspn_dit.')}.md"


def modules_of(package: str) -> list[str]:
    """The modules of a package's page: all below it, but for those that another page has."""
    paths = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    others = [f"{other}." for other in ROOMS if other.startswith(f"{package}.")]
    return [
        name
        for name in names
        if not f"{name}.".startswith(tuple(others)) and not name.endswith("__main__") and name != package
    ]


def reference(package: str, title: str) -> str:
    """The Markdown of a package's page: what it makes public, then every module."""
    lines = [f"# {title}", "", f"::: {package}", "    options: {show_root_heading: false}", ""]
    for module in modules_of(package):
        lines += [f"::: {module}", ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the site has their targets; other files are named, or linked where the sources are online."""
    source = {target: source for source, target in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(match: re.Match[str]) -> str:
        picture, text, link, anchor = match.groups()
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is not None:
            there = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
            return f"{picture}[{text}]({there}{anchor or ''})"
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    return LINK.sub(lead, markdown) if not page.file.src_uri.startswith("reference/") else markdown
