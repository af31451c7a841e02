"""`mmicl bank`: look into a bank of demonstrations' fused tokens (AIM)."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from mmicl_kernels.cli import bank_build
from mmicl_kernels.cli.printing import FAILED, backbone_name, print_table, printable
from mmicl_kernels.cli.shell import reported

if TYPE_CHECKING:  # torch is imported when a command runs
    from mmicl_kernels.store import DemonstrationBank

SHOWN = 60  # characters of a text in a table


def add_parser(commands: Any) -> None:
    """Add `bank` and its commands to the subparsers of `mmicl`."""
    parser = commands.add_parser("bank", help="look into a bank of demonstrations (AIM)")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("folder", help="the bank")
    common.add_argument("--json", action="store_true", help="print JSON, for scripts")
    actions = parser.add_subparsers(dest="action", required=True)

    actions.add_parser("info", help="what is in it, and for which model", parents=[common])
    search = actions.add_parser("search", help="demonstrations by words or by likeness", parents=[common])
    how = search.add_mutually_exclusive_group(required=True)
    how.add_argument("--text", metavar="WORDS", help="each of these words occurs in text or answer")
    how.add_argument("--like", metavar="ID", type=int, help="by cosine of the mean tokens with this one's")
    search.add_argument("--limit", type=int, default=10, help="at most so many (default: 10)")
    actions.add_parser("verify", help="check every byte; exit code 1 if any is damaged", parents=[common])
    bank_build.add_parser(actions)


def run(options: argparse.Namespace) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    if options.action == "build":
        return bank_build.run(options)
    from mmicl_kernels.store import DemonstrationBank

    def act() -> int:
        return _ACTIONS[options.action](DemonstrationBank(options.folder), options)

    return reported("mmicl bank", act, (OSError, ValueError, TypeError, IndexError))


def _info(bank: "DemonstrationBank", options: argparse.Namespace) -> int:
    facts = {
        "demonstrations": len(bank),
        "tokens": int(bank.lengths.sum()),
        "longest": int(bank.lengths.max()) if len(bank) else 0,
        "bytes": sum(path.stat().st_size for path in bank.folder.iterdir() if path.is_file()),
        "dtype": str(bank.dtype).removeprefix("torch."),
        "hidden_size": bank.hidden_size,
        "backbone": backbone_name(bank),
        "digest": bank.digest,
        "prompt": bank.prompt,
    }
    if options.json:
        print(json.dumps(facts))
    else:
        print_table(
            ("", ""), [(name, printable(x) if isinstance(x, str) else f"{x:,}") for name, x in facts.items()]
        )
    return 0


def _search(bank: "DemonstrationBank", options: argparse.Namespace) -> int:
    if options.limit < 1:
        raise ValueError(f"--limit is {options.limit}, expected a positive integer")
    if options.text is not None:
        found = [(None, id) for id in _with_words(bank, options.text, options.limit)]
    else:
        mean = bank.mean(options.like)
        if not bool(mean.any()):
            raise ValueError(f"the mean token of demonstration {options.like} is zero, so nothing is like it")
        found = bank.nearest(mean, options.limit)
    lengths, rows = bank.lengths, []
    for cosine, id in found:
        text, answer = bank.text(id)
        row = {"id": id, "tokens": int(lengths[id]), "text": text, "answer": answer}
        rows.append(row if cosine is None else {"cosine": cosine, **row})
    if options.json:
        print(json.dumps(rows))
        return 0
    columns = ("id", "tokens", "text", "answer")
    print_table(
        columns if options.like is None else ("cosine", *columns),
        [tuple(map(_shown, row.values())) for row in rows],
    )
    return 0


def _with_words(bank: "DemonstrationBank", words: str, limit: int) -> list[int]:
    """The first ids whose text or answer has all words, whatever the case and the normal form."""
    from mmicl_kernels.store.entry_file import normal_form

    wanted, found = normal_form(words).casefold().split(), []
    for id in range(len(bank)):
        if len(found) == limit:
            break
        text = normal_form("\n".join(bank.text(id))).casefold()
        if all(word in text for word in wanted):
            found.append(id)
    return found


def _verify(bank: "DemonstrationBank", options: argparse.Namespace) -> int:
    problems = bank.verify()
    if options.json:
        print(json.dumps(problems))
    else:
        print("\n".join(map(printable, problems)) or f"{len(bank)} demonstrations, nothing damaged")
    return FAILED if problems else 0


_ACTIONS = {"info": _info, "search": _search, "verify": _verify}


def _shown(value: float | int | str) -> str:
    """One cell of a table."""
    if isinstance(value, float):
        return f"{value:.4f}"
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
