"""report.html: report.md with its pictures inside, one file that can be sent and opened anywhere."""

import base64
import html
import re
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; }
code { background: #f2f2f2; padding: 0 0.2rem; }
h2 { border-bottom: 1px solid #ddd; margin-top: 2.2rem; }
nav { columns: 3; font-size: 0.9rem; }
"""
_IMAGE = re.compile(r'src="([^":]+\.png)"')
_HEADING = re.compile(r"<h2>(.*?)</h2>")


def write_html(report: Path) -> Path | None:
    """Renders report.md beside itself as report.html.

    Args:
        report: the Markdown file; pictures that it shows are read from its folder.

    Returns:
        The file; None where the package that renders Markdown is not installed (it comes with TensorBoard).
    """
    try:
        import markdown
    except ImportError:
        return None
    text = report.read_text(encoding="utf-8")
    # Causes in the events may hold anything that a program printed: none of it is markup.
    body = markdown.markdown(html.escape(text, quote=False), extensions=["tables"])
    sections: list[str] = []

    def anchored(heading: re.Match[str]) -> str:
        sections.append(heading[1])
        return f'<h2 id="s{len(sections)}">{heading[1]}</h2>'

    def inside(image: re.Match[str]) -> str:
        path = report.parent / html.unescape(image[1])
        data = base64.b64encode(path.read_bytes()).decode("ascii") if path.is_file() else ""
        return f'src="data:image/png;base64,{data}"'

    body = _HEADING.sub(anchored, _IMAGE.sub(inside, body))
    links = "".join(f'<a href="#s{i}">{name}</a><br>' for i, name in enumerate(sections, start=1))
    title = html.escape(text.splitlines()[0].lstrip("# "))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>{body.replace('</h1>', f'</h1><nav>{links}</nav>', 1)}</body></html>\n"
    )
    path = report.with_suffix(".html")
    unfinished = path.with_suffix(".html.partial")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path
