"""Check each link and picture of a built site: `links.py site` fails if a file or an anchor is missing.

Addresses of other sites are listed, not fetched; a script, style or picture from elsewhere fails.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Collects what a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        for name in ("src", "srcset"):
            if name in given:
                self.loads.append(given[name])


def check(root: Path) -> tuple[list[str], set[str]]:
    """Return what is wrong, and the addresses of other sites."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    faults, elsewhere = [], set()
    for path, page in pages.items():
        if path.name == "404.html":  # served from any depth: its addresses begin with a slash
            continue
        for target in page.links + page.loads:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                elsewhere.add(target)
                if target in page.loads and url.scheme != "data":
                    faults.append(f"{path.name}: loads {target} from elsewhere")
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.is_file():
                faults.append(f"{path.name}: {target}: no such file")
            elif url.fragment and file in pages:
                anchor = unquote(url.fragment)
                if anchor not in pages[file].anchors and not anchor.startswith("__"):
                    faults.append(f"{path.name}: {target}: no such anchor")
    return faults, elsewhere


if __name__ == "__main__":
    root = Path(sys.argv[1])
    found, others = check(root)
    for fault in found:
        print(fault)
    print(
        f"{len(list(root.rglob('*.html')))} pages, {len(others)} addresses elsewhere, {len(found)} faults"
    )
    sys.exit(bool(found))
