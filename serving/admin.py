"""The operator's command: who is let in, which models may be loaded. A running server follows at once.

python -m serving.admin --access access clients
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lvseg.errors import InputError
from serving import access, catalogue, keys
from serving.errors import EXIT_BAD_INPUT, EXIT_DONE, KeyFileError

EXAMPLE = """examples:
  python -m serving.admin server-key
  python -m serving.admin allow-client site-a 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7'
  python -m serving.admin revoke-client site-a
  python -m serving.admin allow-model models/volume/4
  python -m serving.admin rollback volume
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 done; 2 wrong use, or a file that cannot be used.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (InputError, KeyFileError) as error:
        print(f"{parser.prog}: {error.sentence}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_DONE


def _server_key(arguments: argparse.Namespace) -> None:
    print(access.first_start(arguments.access, "").public)


def _clients(arguments: argparse.Namespace) -> None:
    for line in keys.lines_of(access.read_clients(arguments.access / access.CLIENTS)):
        print(line)


def _allow_client(arguments: argparse.Namespace) -> None:
    access.allow_client(arguments.access, arguments.name, arguments.key)
    print(f"{arguments.name} is let in.")


def _revoke_client(arguments: argparse.Namespace) -> None:
    access.revoke_client(arguments.access, arguments.name)
    print(f"{arguments.name} is let in no more.")


def _models(arguments: argparse.Namespace) -> None:
    for folder, entries in catalogue.folders(arguments.access / access.MODELS).items():
        print(f"{folder}:")
        for entry in entries:
            note = "  rolled back" if entry.rolled_back else ""
            print(f"  {entry.model}/{entry.version}  {entry.sha256}  allowed {entry.allowed}{note}")


def _allow_model(arguments: argparse.Namespace) -> None:
    entry = catalogue.allow(arguments.access, arguments.folder)
    print(f"{entry.model}/{entry.version} may be loaded: {entry.sha256}")


def _rollback(arguments: argparse.Namespace) -> None:
    current, before = catalogue.roll_back(arguments.access, arguments.models, arguments.model)
    print(f"{current.model}/{current.version} was rolled back; {before.model}/{before.version} is current.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.admin",
        description="Says who is let in and which models may be loaded; a running server follows at once.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--access", type=Path, default=Path("access"), metavar="DIR", help="the server's access folder")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("server-key", help="the public key that clients need").set_defaults(run=_server_key)
    commands.add_parser("clients", help="who is let in").set_defaults(run=_clients)
    allow = commands.add_parser("allow-client", help="let a client in")
    allow.add_argument("name", metavar="NAME")
    allow.add_argument("key", metavar="PUBLIC_KEY", help="as the client's `keys new` printed it")
    allow.set_defaults(run=_allow_client)
    revoke = commands.add_parser("revoke-client", help="let a client in no more, open connections included")
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(run=_revoke_client)
    commands.add_parser("models", help="which versions may be loaded").set_defaults(run=_models)
    model = commands.add_parser("allow-model", help="allow a version as it is now; the newest allowed one is served")
    model.add_argument("folder", type=Path, metavar="MODELS/NAME/VERSION")
    model.set_defaults(run=_allow_model)
    rollback = commands.add_parser("rollback", help="go back to the version before the current one")
    rollback.add_argument("model", metavar="NAME")
    rollback.add_argument("--models", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    rollback.set_defaults(run=_rollback)
    return parser


if __name__ == "__main__":
    sys.exit(main())
