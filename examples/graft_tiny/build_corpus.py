"""Builds the corpus and the tokenizer that `pretrain.py` needs.

    python examples/graft_tiny/build_corpus.py

Four Debian packages hold the text (`SOURCES`: each with its licence); they are fetched with `apt-get download` and
unpacked below `.corpus/sources`, without installing anything. A fifth part is made up (`conversations.py`). The result
is `.corpus/packed`: `train.bin` and `held_out.bin` (uint16 token ids), `corpus.json` (what is in them) and
`tokenizer/`. The held-out part is chosen by document, so no page is in both.
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import random
import re
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conversations import Knowledge, Writer, words
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 2048
CONTEXT = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<tool_call>", "</tool_call>"]

# ChatML. `generation` marks what an assistant says, its end token included: the part a fine-tune takes its loss on.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role: ' + message.role) -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{{- text_of(message.content) -}}
{%- for call in message.tool_calls or [] -%}
{%- set arguments = call.function.arguments -%}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
{{- arguments if arguments is string else arguments | tojson -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- text_of(message.content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Source:
    """A Debian package whose text may be learnt from and whose learner may be given away."""

    name: str
    package: str
    licence: str
    copyright: str
    notice_file: (
        str | None
    )  # in the package; its words from `notice_start` to `notice_end` are repeated in the model card
    notice_start: str = ""
    notice_end: str = ""


SOURCES = (
    Source(
        "python",
        "python3.11-doc",
        "PSF-2.0",
        "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. Copyright (c) 2000 BeOpen.com. "
        "Copyright (c) 1995-2000 Corporation for National Research Initiatives. "
        "Copyright (c) 1991-1995 Stichting Mathematisch Centrum.",
        "usr/share/doc/python3.11/html/license.html",
        "PSF LICENSE AGREEMENT FOR PYTHON",
        "BEOPEN.COM LICENSE AGREEMENT",
    ),
    Source(
        "postgresql",
        "postgresql-doc-15",
        "PostgreSQL",
        "Portions Copyright (c) PostgreSQL Global Development Group and The Regents of the University of California.",
        "usr/share/doc/postgresql-doc-15/html/legalnotice.html",
        "Portions Copyright",
    ),
    Source("sqlite", "sqlite3-doc", "public domain", "Dedicated to the public domain by its authors.", None),
    Source(
        "wordnet",
        "wordnet-base",
        "WordNet-3.0",
        "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.",
        "usr/share/doc/wordnet-base/copyright",
        "This software and database is being provided",
        "Files: debian",
    ),
)

# Indexes and cross-reference tables (no sentences), and pages of other people's licences and of release bookkeeping.
SKIPPED = re.compile(
    r"genindex|contents\.html|search\.html|py-modindex|license\.html|legalnotice|copyright|requirements\.html"
    r"|doc_\w+_crossref|keyword_index|bookindex|/toc\.html|sitemap|syntaxdiagrams|biblio|changelog\.html|releaselog/"
)


@dataclass(frozen=True)
class Document:
    """One page, entry group or conversation: the unit that is held out or not."""

    part: str
    key: str
    text: str

    @property
    def held_out(self) -> bool:
        """True for one document in thirty-two, always the same ones."""
        return hashlib.sha256(f"{self.part}/{self.key}".encode()).digest()[0] < 8


# -- pages ------------------------------------------------------------------------------------------------------


class PageText(html.parser.HTMLParser):
    """The readable text of one documentation page, and the functions it defines (Sphinx pages only)."""

    VOID = words("area base br col hr img input link meta source wbr")
    HIDDEN = words("script style head nav svg footer button select form")
    BREAKS = words("p div section h1 h2 h3 h4 h5 h6 ul ol dl dt dd table tr pre blockquote article aside hr br")
    HIDDEN_CLASSES = words(
        "headerlink navheader navfooter toc related sphinxsidebar footer indexterm nosearch searchmenu fancy_toc"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tag, whether it hides what is inside
        self.hidden = 0
        self.preformatted = 0
        self.marks: list[tuple[str, int, int]] = []  # dotted name, where its signature starts and ends in `out`
        self.signature: tuple[str, int] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what hides, breaks lines, keeps its spaces, or begins a signature."""
        given = dict(attrs)
        classes = set((given.get("class") or "").split())
        if tag in self.BREAKS:
            self.out.append("\n")
        if tag == "li":
            self.out.append("\n* ")
        if tag in ("td", "th"):
            self.out.append(" | ")
        if tag in self.VOID:
            return
        hides = (
            tag in self.HIDDEN or bool(classes.intersection(self.HIDDEN_CLASSES)) or given.get("aria-hidden") == "true"
        )
        self.open.append((tag, hides))
        self.hidden += hides
        self.preformatted += tag == "pre"
        if tag == "dt" and "sig-object" in classes and given.get("id"):
            self.signature = (str(given["id"]), len(self.out))

    def handle_endtag(self, tag: str) -> None:
        """Undoes what the opening tag began."""
        if tag in self.VOID or all(name != tag for name, _ in self.open):
            return
        while True:  # closes what the page forgot to close as well
            name, hides = self.open.pop()
            self.hidden -= hides
            self.preformatted -= name == "pre"
            if name == tag:
                break
        if tag == "dt" and self.signature is not None:
            self.marks.append((*self.signature, len(self.out)))
            self.signature = None
        if tag in self.BREAKS:
            self.out.append("\n")

    def handle_data(self, data: str) -> None:
        """Keeps text that a reader would see."""
        if not self.hidden:
            self.out.append(data if self.preformatted else re.sub(r"\s+", " ", data))


PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00b6": "",
    }
)


def plain(text: str) -> str:
    """Typographic characters as ASCII ones: each would cost a small vocabulary several tokens."""
    return unicodedata.normalize("NFC", text).translate(PLAIN)


def tidy(text: str, seen: set[bytes]) -> str:
    """Collapses blank lines, drops table rulings, and long lines that an earlier page already had."""
    lines: list[str] = []
    for raw in plain(text).split("\n"):
        line = re.sub(r"(\S) {2,}", r"\1 ", raw.rstrip())
        line = re.sub(r"^\s*\|\s*|\s*\|\s*$", "", line)
        if len(line) > 50:
            digest = hashlib.md5(line.encode(), usedforsecurity=False).digest()
            if digest in seen:
                continue
            seen.add(digest)
        empty = not line.strip(" |*>")
        if line.startswith("This page last modified") or (empty and (line.strip() or not lines or not lines[-1])):
            continue
        lines.append("" if empty else line)
    return "\n".join(lines).strip() + "\n"


def read_pages(source: Source, folder: Path, knowledge: Knowledge) -> Iterator[Document]:
    """Every page of one package, and for Python's the functions it describes."""
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*.html")):
        key = path.relative_to(folder).as_posix()
        if SKIPPED.search(key):
            continue
        page = PageText()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        text = tidy("".join(page.out), seen)
        if "\ufffd" in text or len(text) < 400:
            continue
        document = Document(source.name, key, text)
        if not document.held_out:
            knowledge.functions += functions_of(page)
        yield document


def functions_of(page: PageText) -> Iterator[tuple[str, list[str], str]]:
    """Name, argument names and first sentence of everything the page documents."""
    for name, start, end in page.marks:
        signature = plain("".join(page.out[start:end])).strip()
        after = plain("".join(page.out[end : end + 60])).strip().split("\n")[0]
        sentence = re.split(r"(?<=[a-z)`'\"])\.(?:\s|$)", after, maxsplit=1)[0].strip()
        inside = re.search(r"\((.*)\)", signature, re.DOTALL)
        arguments = (
            [re.split(r"[=:]", part)[0].strip(" *[]\n") for part in inside.group(1).split(",")] if inside else []
        )
        arguments = [argument for argument in arguments if re.fullmatch(r"[a-z_]\w*", argument)]
        useful = re.match(r"(?!New in|Changed|Deprecated|Return value)[A-Z]", sentence) and not sentence.endswith("e.g")
        if inside and useful and 15 <= len(sentence) <= 220 and "." in name and not name.startswith("c."):
            yield name, arguments[:8], sentence + "."


# -- WordNet ----------------------------------------------------------------------------------------------------

COARSE = re.compile(r"obscen|vulgar|offensive|slur\b|sexual|derogat|disparag|prostitut|genital|copulat|ethnic")
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def read_wordnet(folder: Path, knowledge: Knowledge) -> Iterator[Document]:
    """Dictionary entries, grouped into pages of related meanings; proper names are left out."""
    plain_words: set[str] = set()
    for suffix, part in PARTS_OF_SPEECH.items():
        lines = next(folder.rglob(f"data.{suffix}")).read_text(encoding="utf-8").splitlines()
        first_word = {line[:8]: line.split()[4].replace("_", " ") for line in lines if line[:8].isdigit()}
        common = common_words(folder, suffix)
        entries: list[str] = []
        for line in lines:
            if not line[:8].isdigit():
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            size = int(fields[3], 16)
            names = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * size : 2]]
            if not names[0][0].islower() or re.search(r"\bgenus\b", gloss) or COARSE.search(gloss):
                continue
            word = names[0]
            meaning = "; ".join(piece for piece in split_gloss(gloss) if not piece.startswith('"'))
            samples = [piece.strip('"') for piece in split_gloss(gloss) if piece.startswith('"')]
            general = re.search(r" @ (\d{8}) [nv]", head)
            entry = f"{word} ({part}): {meaning}."
            if size > 1:
                entry += f" Also: {', '.join(names[1:])}."
            if general:
                entry += f" A kind of {first_word[general.group(1)]}." if part == "noun" else ""
            entry += "".join(f' Example: "{sample}".' for sample in samples)
            entries.append(plain(entry))
            if not meaning or len(meaning) > 160 or word not in common:
                continue
            if Document("wordnet", f"{suffix}/{(len(entries) - 1) // 12}", "").held_out:
                continue
            knowledge.glosses.append((word, part, plain(meaning)))
            knowledge.examples += [(word, plain(s)) for s in samples if re.search(rf"\b{re.escape(word)}", s)]
            if general and part == "noun":
                knowledge.kinds.append((word, first_word[general.group(1)]))
            if size > 1:
                knowledge.synonyms.append((word, names[1:5]))
            plain_words.update(w for w in names if w in common and re.fullmatch(r"[a-z]{2,11}", w))
        for start in range(0, len(entries), 12):
            yield Document("wordnet", f"{suffix}/{start // 12}", "\n".join(entries[start : start + 12]) + "\n")
    knowledge.words = sorted(plain_words)


def common_words(folder: Path, suffix: str) -> set[str]:
    """The words that WordNet's authors met in running text: rare ones are worth reading, not worth asking about."""
    found: set[str] = set()
    for line in next(folder.rglob(f"index.{suffix}")).read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        if int(fields[5 + int(fields[3])]) > 0:  # lemma, part, senses, n, n pointers, senses again, senses met in text
            found.add(fields[0].replace("_", " "))
    return found


def split_gloss(gloss: str) -> list[str]:
    """A gloss is meanings and quoted examples, separated by semicolons that may also stand inside quotes."""
    return [piece.strip() for piece in re.findall(r'"[^"]*"|[^;"]+', gloss) if piece.strip(" ,.-")]


# -- tokenizer --------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], folder: Path) -> Tokenizer:
    """Byte-level BPE: every string can be written; digits stand alone, which makes numbers easy to copy."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+| +(?= )|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def render(messages: list[dict[str, str]]) -> str:
    """What the chat template writes for plain text messages, without loading transformers."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


# -- all of it --------------------------------------------------------------------------------------------------


def fetch(source: Source, folder: Path) -> tuple[Path, str]:
    """Downloads and unpacks one package, unless it is there; returns its folder and its version."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.package
    if not list(folder.glob(f"{source.package}_*.deb")):
        subprocess.run(["apt-get", "download", source.package], cwd=folder, check=True)
    archive = next(folder.glob(f"{source.package}_*.deb"))
    if not target.exists():
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
    version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True).stdout
    return target, version.strip()


def notice_of(source: Source, folder: Path) -> str:
    """The licence's own words, as the package carries them; some licences ask that they travel along."""
    if source.notice_file is None:
        return source.copyright
    text = (folder / source.notice_file).read_text(encoding="utf-8")
    if source.notice_file.endswith(".html"):
        page = PageText()
        page.feed(text)
        text = "".join(page.out)
    else:
        text = re.sub(r"(?m)^ \.$", "", text)
    text = text[text.index(source.notice_start) :]
    if source.notice_end:
        text = text[: text.index(source.notice_end)]
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", plain(text))]
    return "\n\n".join([source.copyright, *filter(None, paragraphs)])


def pack(documents: list[Document], tokenizer: Tokenizer, end: int) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """One long row of token ids, each document ended by `<|endoftext|>`, and how much each part holds."""
    counts: dict[str, dict[str, int]] = {}
    rows: list[np.ndarray] = []
    for start in range(0, len(documents), 2000):
        chunk = documents[start : start + 2000]
        for document, encoding in zip(chunk, tokenizer.encode_batch([d.text for d in chunk]), strict=True):
            rows.append(np.array([*encoding.ids, end], dtype=np.uint16))
            count = counts.setdefault(document.part, {"documents": 0, "bytes": 0, "tokens": 0})
            count["documents"] += 1
            count["bytes"] += len(document.text.encode())
            count["tokens"] += len(rows[-1])
    return np.concatenate(rows), counts


def main() -> None:
    """Fetches, cleans, makes up, trains the tokenizer, writes the token files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".corpus"))
    parser.add_argument("--conversations", type=int, default=30_000)
    parser.add_argument("--stories", type=int, default=2_000, help="short runs of everyday sentences")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    knowledge = Knowledge()
    documents: list[Document] = []
    learnt_from: list[dict[str, str]] = []
    for source in SOURCES:
        folder, version = fetch(source, options.folder / "sources")
        learnt_from.append(
            {
                "name": source.name,
                "package": source.package,
                "version": version,
                "licence": source.licence,
                "notice": notice_of(source, folder),
            }
        )
        if source.name == "wordnet":
            documents += read_wordnet(folder, knowledge)
        else:
            documents += read_pages(source, folder, knowledge)
    writer = Writer(knowledge, rng)
    documents += [Document("stories", str(i), writer.story() + "\n") for i in range(options.stories)]
    documents += [
        Document("conversations", str(i), render(writer.conversation())) for i in range(options.conversations)
    ]
    rng.shuffle(documents)
    train = [document for document in documents if not document.held_out]
    held_out = sorted((d for d in documents if d.held_out), key=lambda d: d.part)

    packed = options.folder / "packed"
    marks = re.compile("|".join(map(re.escape, SPECIAL)))
    tokenizer = train_tokenizer((marks.sub("", document.text) for document in train), packed / "tokenizer")
    end = SPECIAL.index("<|endoftext|>")
    train_ids, train_counts = pack(train, tokenizer, end)
    held_ids, held_counts = pack(held_out, tokenizer, end)
    train_ids.tofile(packed / "train.bin")
    held_ids.tofile(packed / "held_out.bin")
    summary = {
        "seed": options.seed,
        "sources": learnt_from,
        "train": train_counts,
        "held_out": held_counts,  # the parts lie in held_out.bin one after the other, in this order
    }
    (packed / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name, counts in (("train", train_counts), ("held out", held_counts)):
        for part, count in counts.items():
            per_token = count["bytes"] / count["tokens"]
            print(f"{name:9} {part:14} {count['documents']:6} documents {count['bytes'] / 1e6:7.2f} MB "
                  f"{count['tokens'] / 1e6:7.3f} M tokens {per_token:.2f} bytes per token")  # fmt: skip


if __name__ == "__main__":
    main()
