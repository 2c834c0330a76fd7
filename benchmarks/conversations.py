"""Hold conversations of 64k tokens, of which nine in ten are cached and 400 are answered, and check the hit rate.

    python benchmarks/conversations.py -pcp 2 --conversations 4 --output-json F

The prompts are those of `twofold bench serve --dataset-name conversations`; the model is the tests' tiny one, with room
for them. So times say nothing of a real model. What is checked: all turns are answered in full, a turn after the first
finds all that was said before it in the cache but its last answer, whose text a random model's tokens do not survive,
and the server's own metrics, which the dashboard shows, tell the same rate.
"""

import json
import sys
import tempfile
from pathlib import Path

from server_common import arguments, save_tiny_model, serve, write

from twofold.cli.main import main as twofold

LENGTHS = {"shared-prefix-len": 8192, "prefix-len": 32768, "turn-len": 4500, "output-len": 400}
NUM_TURNS, MAX_MODEL_LEN, BLOCK = 6, 72_000, 64


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--conversations", type=int, default=4)
    args = parser.parse_args()
    lengths = [word for name, value in LENGTHS.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "model", max_positions=MAX_MODEL_LEN)
        with serve(
            model, folder, "-pcp", str(args.pcp), "--served-model-name", "model", *args.engine.split()
        ) as server:
            command = ["bench", "serve", "--base-url", server.url, "--tokenizer", str(model), "--disable-tqdm"]
            command += ["--backend", "openai-chat", "--dataset-name", "conversations", "--ignore-eos", "--save-result"]
            command += ["--num-conversations", str(args.conversations), "--num-turns", str(NUM_TURNS), *lengths]
            code = twofold([*command, "--result-dir", str(folder), "--result-filename", "result.json"])
            server.assert_idle()
            metrics = {which: server.metric(f"prefix_cache_{which}_total") for which in ("hits", "queries")}
        result = json.loads((folder / "result.json").read_text())
    turns, new = result["turns"], LENGTHS["turn-len"] + LENGTHS["output-len"]
    # Beside the new text: words of the template, and the rest of a block.
    missing = [round(turn["mean_input_tokens"] * (1 - turn["prefix_cache_hit_rate"])) for turn in turns]
    told = {key: result[key] for key in ("completed", "failed", "duration", "total_output_tokens")}
    told |= {key: result[key] for key in ("total_input_tokens", "total_cached_tokens", "prefix_cache_hit_rate")}
    told |= {"metrics_hit_rate": metrics["hits"] / metrics["queries"], "computed_per_turn": missing, "turns": turns}
    write(args, told)
    well = code == result["failed"] == 0 and result["completed"] == args.conversations * NUM_TURNS
    well = well and all(count < new + 2 * BLOCK for count in missing[1:])
    return 0 if well and abs(told["metrics_hit_rate"] - result["prefix_cache_hit_rate"]) < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
