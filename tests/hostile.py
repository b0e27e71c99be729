"""Names that would become code or markup if a file did not escape them, and readers of files."""

import ast
from html.parser import HTMLParser

from markdown_it import MarkdownIt

NAMES = [
    'a "b" c',
    "it's",
    'x"); import os; os.system("touch hacked") #',
    "x'); import os; os.system('touch hacked') #",
    "<img src=x onerror=alert(1)>",
    "</title></pre><script>alert(1)<!--",
    "`</code>` ``<b>`` ![a](b) [c](javascript:d) *e* # f",
    "```python",
    "line\nbreak\n```\n# heading",
    "\u202eright to left\u2028separator\x85",
    "$\\frac{$ {{ 7 * 7 }} {% raw %} %s {0}",
    "Größe 图片 \U0001f600",
]
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "pre"),
    *("table", "tr", "th", "td", "ul", "ol", "li", "img", "code", "a", "details", "summary"),
    *("figure", "figcaption", "span", "strong", "header", "main", "nav", "section", "thead"),
    *("tbody", "small", "label", "select", "option", "button", "input", "script"),
    *("svg", "path", "circle", "line", "rect", "text", "wbr"),
}
"""Tags that a page of the package may hold."""


class Page(HTMLParser):
    """The tags and the text of a page, as a browser reads them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def count(self, tag):
        """How many elements of a kind there are."""
        return self.tags.count(tag)

    def handle_data(self, data):
        self.text += data


def assert_harmless(html: str) -> Page:
    """Check that a page holds no tag, handler or address that a name brought."""
    page = Page(html)
    assert set(page.tags) <= TAGS, set(page.tags) - TAGS
    # A report has its data and its script, and other pages have none. A name that closed one of
    # them would leave tags after it.
    assert page.count("script") == 2 * (("type", "application/json") in page.attributes)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    addresses = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in addresses)
    return page


def read_card(text: str) -> tuple[Page, str]:
    """Return a model card as a page, and its Python code. Its head of YAML is left out."""
    _, _, rest = text.partition("---\n")
    body = rest.partition("\n---\n")[2]
    tokens = MarkdownIt("commonmark").parse(body)
    code = [token.content for token in tokens if token.type == "fence"]
    page = assert_harmless(MarkdownIt("commonmark").render(body))
    assert len([token for token in tokens if token.type == "heading_open"]) == 1
    return page, "".join(code)


def calls(code: str) -> dict[str, list[object]]:
    """Return the literal arguments of every call in a program, by the name of the function."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {
        ast.unparse(node.func).rpartition(".")[2]: [ast.literal_eval(a) for a in node.args]
        for node in nodes
    }
