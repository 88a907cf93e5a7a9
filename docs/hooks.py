"""What the site needs besides Markdown: equations as MathML, the pictures of the benchmarks, and the notebooks."""

import base64
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_FROM_DOCS = re.compile(r"\]\(\.\./((?:\.\./)*notebooks/\w+)\.ipynb\)")
_FROM_NOTEBOOK = re.compile(r"\]\((\w+)\.ipynb\)")


def on_files(files, config):
    """Take in the pictures of `benchmarks/` and the notebooks, under the same path."""
    for source in sorted([*ROOT.glob("benchmarks/*.png"), *ROOT.glob("notebooks/*.ipynb")]):
        path = source.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(source)))
        if source.suffix == ".ipynb":
            for name, content in _pages(source):
                files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Make links to a notebook, which are right in the repository, lead to its page."""
    return _FROM_DOCS.sub(r"](\1.md)", markdown)


def on_page_content(html, page, config, files):
    """Turn equations into MathML, which browsers draw without a script or a font."""
    html = _BLOCK.sub(lambda m: f'<div class="equation">{_mathml(m[1], "block")}</div>', html)
    return _INLINE.sub(lambda m: _mathml(m[1], "inline"), html)


def _mathml(latex, display):
    text = latex.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return convert(text.strip(), display=display)


def _pages(source):
    """Yield a notebook as a page of Markdown, and its pictures; an output of another kind raises."""
    parts, heading, pictures = [], "", 0
    for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            heading = headings[-1] if headings else heading
            parts.append(_FROM_NOTEBOOK.sub(r"](\1.md)", text))
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                name = f"{source.stem}_{pictures}.png"
                yield name, base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{heading}]({name})")
            else:
                printed = "".join(output["text"] if "text" in output else data["text/plain"])
                parts.append(f"```{{.text .no-copy .output}}\n{printed.rstrip()}\n```")
    parts.append(f"[Download this notebook]({source.name})")
    yield f"{source.stem}.md", "\n\n".join(parts)
