"""Where a method comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reference:
    """Where a method comes from: a paper, or, with an empty `arxiv`, a published program at `code`.

    Attributes:
        section: Where in the paper the definition stands.
        code: The authors' repository, or "" if none.
        bibtex: The entry `cite` prints.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str
    section: str = ""
    code: str = ""
    venue: str = ""

    def at(self, section: str) -> Reference:
        """The same work, at the place where one method stands."""
        return replace(self, section=section)

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.code

    @property
    def label(self) -> str:
        """How a sentence points to it: `arXiv:2410.10781`, or the address of the program."""
        return f"arXiv:{self.arxiv}" if self.arxiv else self.code

    @property
    def bibtex(self) -> str:
        kind = "article" if self.arxiv else "misc"
        lines = [
            f"@{kind}{{{self.key},",
            f"  title   = {{{self.title}}},",
            f"  author  = {{{self.authors}}},",
        ]
        if self.arxiv:
            lines.append(f"  journal = {{{self.venue or 'arXiv preprint arXiv:' + self.arxiv}}},")
        lines.append(f"  year    = {{{self.year}}},")
        if self.arxiv:
            lines += [f"  eprint  = {{{self.arxiv}}},", "  archivePrefix = {arXiv}", "}"]
        else:
            lines += [f"  howpublished = {{\\url{{{self.code}}}}}", "}"]
        return "\n".join(lines)
