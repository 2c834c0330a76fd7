"""What documents quote exists: messages, files that they link to, commands and flags."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from twofold.cli.main import COMMANDS, make_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _texts(tree: ast.AST) -> list[str]:
    """All strings of a module, with `…` where one has a value."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_messages_in_troubleshooting_exist() -> None:
    """Users search for the words that they see. A message that was reworded would be found no more."""
    sources = (ROOT / "src").rglob("*.py")
    known = [text for path in sources for text in _texts(ast.parse(path.read_text()))]
    known += (ROOT / "scripts/setup").read_text().splitlines()
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.*?)`", page, re.MULTILINE)
    assert len(messages) > 25
    for message in messages:
        words = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
        assert any(re.search(".*".join(words), text, re.DOTALL) for text in known), message


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_no_document_and_no_message_says_that_an_index_has_twofold() -> None:
    """It is on none; `pip install twofold` could bring anything. A message once named `twofold[ray]`."""
    examples = [path for path in (ROOT / "examples").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for path in [*DOCUMENTS, *(ROOT / "src").rglob("*.py"), *examples]:
        assert not re.search(r"(pip install|uv add|pipx install)[^\n`]* ['\"]?twofold\b(?!-)", path.read_text()), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_can_be_given(path: Path) -> None:
    """Every line `twofold COMMAND …` of a document is read by the command line as it stands."""
    parser = make_parser()
    for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"\s#.*", "", line).split(";")[0]
            if match := re.fullmatch(rf"(?:\S*/)?twofold ((?:{'|'.join(COMMANDS)})\b.*)", words.strip()):
                arguments = shlex.split(match[1])
                if not {"--help", "|"} & set(arguments):
                    parser.parse_args(arguments)
