"""
The C{colo} command: what an operator does from a shell. It speaks to daemons through their control sockets.

No reactor: each command asks, prints and exits, with a status that scripts can use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from glob import escape, glob
from pathlib import Path

from colotx._explain import explainText
from colotx._qmp_blocking import BlockingQmp, Unreachable
from colotx._report import statisticsText, statusText
from colotx.control import controlDirectory
from colotx.errors import ColoError, ConfigError, QmpError

OK = 0
ERROR = 1
USAGE = 2
NOT_PROTECTED = 3
UNREACHABLE = 4

FAILOVER_TIME = 60.0
"""Seconds a failover may take until we stop waiting for its end."""

_EXIT_CODES = f"""\
exit status:
  {OK}  done; for status: protected
  {ERROR}  refused or failed; standard error says why
  {USAGE}  wrong usage
  {NOT_PROTECTED}  status: resyncing, degraded or unprotected
  {UNREACHABLE}  no daemon answers
"""

_SOCKET_HELP = "control socket of the daemon (default: the only one of this user)"


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command.

    @param argv: arguments without the command's name; default: of the process.
    @return: the exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything behind "demo", --help included, is the demo's own.
    if arguments[:1] == ["demo"]:
        return _demo(arguments[1:])
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except Unreachable as error:
        return _complain(str(error), UNREACHABLE)
    except _AmbiguousSocket as error:
        return _complain(str(error), USAGE)
    except QmpError as error:
        # The daemon's own words; nearly all are of the class GenericError, which tells an operator nothing.
        return _complain(error.description, ERROR)
    except ColoError as error:
        return _complain(str(error), ERROR)


class _AmbiguousSocket(ConfigError):
    """Several daemons; the user must choose."""


def _complain(message: str, status: int) -> int:
    print(f"colo: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colo",
        description="See and steer the daemons (twistd colo) that keep virtual machines running.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    def addToDaemon(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        command = add(name, run, text)
        command.add_argument("--socket", metavar="PATH", help=_SOCKET_HELP)
        return command

    def asJson(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--json", action="store_true", help="print the daemon's answer as one JSON object"
        )

    asJson(addToDaemon("status", _status, "how protected the guest is, since when, why, and what to do"))
    asJson(addToDaemon("stats", _statistics, "checkpoints, bytes, phase timings, held frames, last outage"))
    explain = addToDaemon(
        "explain", _explain, "what the two VMs of an active pair said differently, and what that cost"
    )
    explain.add_argument(
        "--last", type=int, default=10, metavar="N", help="how many to show (default: %(default)s)"
    )
    asJson(explain)
    addToDaemon("checkpoint", _checkpoint, "ask for a checkpoint now")
    addToDaemon(
        "failover", _failover, "let the guest go on here alone; only when the peer's host is dead for certain"
    )

    certs = commands.add_parser("certs", help="make the certificates of the link between two hosts")
    kinds = certs.add_subparsers(metavar="COMMAND", required=True)
    init = kinds.add_parser("init", help="make an authority; once for both hosts")
    init.add_argument(
        "directory", nargs="?", type=Path, default=Path("colotx-ca"), help="default: %(default)s"
    )
    init.set_defaults(run=_certsInit)
    issue = kinds.add_parser("issue", help="make a certificate; once for each host")
    issue.add_argument(
        "names", nargs="+", metavar="NAME", help="DNS name or IP address the peer knows the host by"
    )
    issue.add_argument(
        "--authority",
        type=Path,
        default=Path("colotx-ca"),
        metavar="DIR",
        help="directory of the authority (default: %(default)s)",
    )
    issue.add_argument("--out", type=Path, metavar="DIR", help="where to put it (default: the first name)")
    issue.set_defaults(run=_certsIssue)

    commands.add_parser(
        "demo", add_help=False, help="kill hosts under a guest and see it live on; see colo demo --help"
    )
    return parser


def _connect(options: argparse.Namespace) -> BlockingQmp:
    return BlockingQmp(options.socket or _onlySocket())


def _onlySocket() -> str:
    directory = controlDirectory()
    paths = sorted(glob(os.path.join(escape(directory), "*.sock")))
    if len(paths) == 1:
        return paths[0]
    if not paths:
        raise Unreachable(
            f"no control socket in {directory}; start a daemon (twistd colo --help) or name its socket with --socket"
        )
    listed = "".join(f"\n  --socket {path}" for path in paths)
    raise _AmbiguousSocket(f"several daemons; say which one:{listed}")


def _ask(qmp: BlockingQmp, command: str) -> dict[str, object]:
    answer = qmp.execute(command)
    if not isinstance(answer, dict):
        raise ColoError(f"the daemon's answer to {command} is no object; is it another version?")
    return answer


def _status(options: argparse.Namespace) -> int:
    with _connect(options) as qmp:
        status = _ask(qmp, "query-colotx-status")
    print(json.dumps(status) if options.json else statusText(status))
    return OK if status.get("status") == "protected" else NOT_PROTECTED


def _statistics(options: argparse.Namespace) -> int:
    with _connect(options) as qmp:
        statistics = _ask(qmp, "query-colotx-stats")
    print(json.dumps(statistics) if options.json else statisticsText(statistics))
    return OK


def _explain(options: argparse.Namespace) -> int:
    with _connect(options) as qmp:
        evidence = _ask(qmp, "query-colotx-evidence")
    print(json.dumps(evidence) if options.json else explainText(evidence, max(0, options.last)))
    return OK


def _checkpoint(options: argparse.Namespace) -> int:
    with _connect(options) as qmp:
        qmp.execute("xen-colo-do-checkpoint")
    print("checkpoint asked for")
    return OK


def _failover(options: argparse.Namespace) -> int:
    with _connect(options) as qmp:
        qmp.execute("x-colo-lost-heartbeat", timeout=FAILOVER_TIME)
    print("failover done: the guest goes on here alone; see colo status")
    return OK


def _certsInit(options: argparse.Namespace) -> int:
    from colotx.certificates import initAuthority

    path = initAuthority(options.directory)
    print(f"{path} is the authority; keep ca.key beside it secret, both hosts must trust {path.name}")
    print(f"next, for each host: colo certs issue --authority {options.directory} NAME-OR-ADDRESS...")
    return OK


def _certsIssue(options: argparse.Namespace) -> int:
    from colotx.certificates import issue

    directory = options.out or Path(options.names[0])
    ca, certificate, key = issue(options.authority, options.names, directory)
    print(f"copy {directory} to {options.names[0]} and give its daemon")
    print(f"  --ca={ca.name} --certificate={certificate.name} --key={key.name}")
    return OK


def _demo(arguments: list[str]) -> int:
    from colotx.lab.demo import main as demo

    return demo(arguments)
