"""What the site adds to docs/: README as its first page, a page of every stage's public names, pictures of benchmarks.

The documents are written to be read where the repository is. A link from them to a file that the site has not becomes
the file's path.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
INSIDE = re.compile(r"\]\((?!https?://|#)(docs/)?")
OUTSIDE = re.compile(r"(!?)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that are not in docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    front = INSIDE.sub(lambda link: "](" if link[1] else "](../", readme).replace('="docs/', '="')  # HTML has links too
    pages = {"index.md": front, **dict(api_pages())}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for picture in ROOT.glob("benchmarks/results/*.png"):
        files.append(File.generated(config, str(picture.relative_to(ROOT)), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turns links that lead out of docs/ into the names of the files."""
    return OUTSIDE.sub(without_link, markdown)


def without_link(link: re.Match) -> str:
    """A picture from inside the site, or the words of a link with the path that it led to."""
    is_picture, words, path = link.groups()
    if is_picture:
        return f"![{words}]({path})"
    return words if Path(path).name in words else f"{words} (`{path}`)"


def api_pages() -> Iterator[tuple[str, str]]:
    """Name and Markdown of a page for each stage of `tabom`, and of one for `tabom_kernels`."""
    stages = defaultdict(list)
    for module, name in public_names("tabom"):
        stages[module.split(".")[1]].append(f"::: {module}.{name}")
    for stage, names in stages.items():
        yield f"api/{stage}.md", "\n\n".join([f"# {stage.capitalize()}", "Import these from `tabom`.", *names])
    names = [f"::: {module}.{name}" for module, name in public_names("tabom_kernels")]
    yield "api/kernels.md", "\n\n".join(["# Kernels", "Import these from `tabom_kernels`.", *names])


def public_names(package: str) -> Iterator[tuple[str, str]]:
    """Module and name of what a package exports, read from its `__init__.py`."""
    for node in ast.walk(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
            yield from ((node.module, alias.name) for alias in node.names)
