"""measure time to first token, latency of a batch, throughput, or a server under load"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib import import_module

BENCHMARKS = ("ttft", "latency", "throughput", "serve")


def configure(parser: ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True, dest="benchmark")
    for name in BENCHMARKS:
        module = import_module(f"twofold.bench.{name}")
        command = benchmarks.add_parser(
            name,
            help=str(module.__doc__).partition("\n")[0],
            description=module.__doc__,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(command)


def run(args: Namespace) -> int:
    code: int = import_module(f"twofold.bench.{args.benchmark}").run(args)
    return code
