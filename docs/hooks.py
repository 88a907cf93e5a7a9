"""What the site needs besides Markdown: equations as MathML, and the pictures that live beside the benchmarks."""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def on_files(files, config):
    """Take in the pictures of `benchmarks/`, under the same path."""
    for picture in sorted(ROOT.glob("benchmarks/*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_content(html, page, config, files):
    """Turn equations into MathML, which browsers draw without a script or a font."""
    html = _BLOCK.sub(lambda m: f'<div class="equation">{_mathml(m[1], "block")}</div>', html)
    return _INLINE.sub(lambda m: _mathml(m[1], "inline"), html)


def _mathml(latex, display):
    text = latex.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    return convert(text.strip(), display=display)
