"""python -m benchmarks.finding.real_tasks SOURCES OUT: the real tasks of the second study, from public repositories.

SOURCES holds clones, or these files of them alone:

    SVAMP/data/mawps-asdiv-a_svamp/{train,dev}.csv      github.com/arkilpatel/SVAMP, MIT; looked at: 689d7ccac74b
    nl2bash/data/bash/all.{nl,cm}                       github.com/TellinaTool/nl2bash, MIT; 466c5fe873ab
    LASER/data/tatoeba/v1/tatoeba.{fra,deu,spa}-eng.*   github.com/facebookresearch/LASER, CC BY 2.0 FR; 74bc6ae7ffb7
    xquad/xquad.en.json                                 github.com/google-deepmind/xquad, CC BY-SA 4.0; 7d30520c7175

Which examples are items and which are probes, and which sentences a question is asked about, stands in
`real_tasks.json` beside this script, by digests and ids; what is in neither is trained on. `main` says where the result
differs from the digests that the study used.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.measuring import script_parser
from simmerge_ray.base.errors import InputError
from simmerge_ray.base.storage import digest_bytes, digest_json, jsonl_bytes, read_json, write_atomically

SPLIT = Path(__file__).with_name("real_tasks.json")
DIGITS = 10  # of a prompt's digest
LANGUAGES = {"fra": "French", "deu": "German", "spa": "Spanish"}
_MAX_COMMAND, _MIN_COMMAND, _MAX_REQUEST, _MAX_SENTENCE = 48, 4, 110, 70
_OWN_PATHS = re.compile(r"/(tmp|root|work)\b")  # paths of the machine on which the tasks were made
_SENTENCE_END = re.compile(r'(?<=[.!?]) +(?=[A-Z0-9"(])')

SentencesOf = Mapping[str, list[list[int]]]  # numbers of sentences, for each time that a question is asked, by its id
Pairs = Iterator[tuple[str, str]]


def math_pairs(sources: Path, _: SentencesOf) -> Pairs:
    """Word problems with their numbers put in, and equations in infix notation, parentheses around what is nested."""
    for part in ("train", "dev"):
        with (sources / "SVAMP/data/mawps-asdiv-a_svamp" / f"{part}.csv").open(
            encoding="utf-8-sig", newline=""
        ) as file:
            for row in csv.DictReader(file):
                numbers = [_short(number) for number in row["Numbers"].split()]
                question = re.sub(r" ([.,?!;:'])", r"\1", _filled(row["Question"], numbers)).strip()
                yield f"Question: {question}\nEquation:", f" {infix(_filled(row['Equation'], numbers))}"


def bash_pairs(sources: Path, _: SentencesOf) -> Pairs:
    """Short requests and short commands."""
    folder = sources / "nl2bash/data/bash"
    for request, command in zip(_lines(folder / "all.nl"), _lines(folder / "all.cm"), strict=True):
        fits = len(request) <= _MAX_REQUEST and _MIN_COMMAND <= len(command) <= _MAX_COMMAND
        if fits and not _OWN_PATHS.search(f"{request}\n{command}"):
            yield f"Task: {request}\nCommand:", f" {command}"


def translation_pairs(sources: Path, _: SentencesOf) -> Pairs:
    """Short English sentences and their translations."""
    for code, language in LANGUAGES.items():
        path = sources / "LASER/data/tatoeba/v1"
        files = [_lines(path / f"tatoeba.{code}-eng.{side}") for side in ("eng", code)]
        for english, other in zip(*files, strict=True):
            if len(english) <= _MAX_SENTENCE:
                yield f"English: {english}\n{language}:", f" {other}"


def qa_pairs(sources: Path, sentences_of: SentencesOf) -> Pairs:
    """Questions about some sentences of their passage."""
    for article in json.loads((sources / "xquad/xquad.en.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            sentences = _SENTENCE_END.split(paragraph["context"])
            for question in paragraph["qas"]:
                for numbers in sentences_of.get(question["id"], []):
                    context = " ".join(sentences[number] for number in numbers)
                    prompt = f"Context: {context}\nQuestion: {question['question'].strip()}\nAnswer:"
                    yield prompt, f" {question['answers'][0]['text']}"


MAKERS: Mapping[str, Callable[[Path, SentencesOf], Pairs]] = {
    "math": math_pairs,
    "bash": bash_pairs,
    "translation": translation_pairs,
    "qa": qa_pairs,
}


def infix(equation: str) -> str:
    """`- number * number number` with numbers put in, as people write it."""
    tokens = equation.split()

    def read() -> tuple[str, bool]:
        token = tokens.pop(0)
        if token not in tuple("+-*/"):
            return token, False
        sides = [f"({text})" if nested else text for text, nested in (read(), read())]
        return f"{sides[0]} {token} {sides[1]}", True

    return read()[0]


def make_real_tasks(sources: Path, out: Path, split: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Write `OUT/<task>/{train,items,probes}.jsonl`; digests of what was written, whatever the order of its lines.

    Raises InputError: a source is missing, or has none of the items that the split names.
    """
    digests = {}
    for task, make in MAKERS.items():
        of_task = split[task]
        try:
            answers = dict(make(sources, of_task.get("sentences", {})))  # of a question that is asked twice the last
        except OSError as error:
            raise InputError(f"{task}: {error.filename} cannot be read; it is a file of a public repository") from None
        kinds = {prompt: _kind(prompt, of_task) for prompt in answers}
        rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in ("train", "items", "probes")}
        for prompt in sorted(answers):
            kind = kinds[prompt]
            row = {"text": prompt} if kind == "probes" else {"prompt": prompt, "target": answers[prompt]}
            rows[kind].append(row)
        for kind, of_kind in rows.items():
            if not of_kind:
                raise InputError(f"{task}: the sources hold none of its {kind}")
            write_atomically(out / task / f"{kind}.jsonl", jsonl_bytes(of_kind))
            digests[f"{task}/{kind}"] = digest_json(of_kind)
    return digests


def prompt_digest(prompt: str) -> str:
    return digest_bytes(prompt.encode())[:DIGITS]


def _kind(prompt: str, of_task: Mapping[str, object]) -> str:
    digest = prompt_digest(prompt)
    return next((kind for kind in ("items", "probes") if digest in of_task[kind]), "train")


def _short(number: str) -> str:
    return str(int(float(number))) if float(number).is_integer() else str(float(number))


def _filled(text: str, numbers: list[str]) -> str:
    return re.sub(r"number(\d+)", lambda found: numbers[int(found[1])], text)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    split = read_json(SPLIT)
    digests = make_real_tasks(arguments.sources, arguments.out, split)
    for name, digest in digests.items():
        print(f"{name:<20} {digest[:16]}  {'as in the study' if digest == split['digests'][name] else 'DIFFERS'}")


if __name__ == "__main__":
    main()
