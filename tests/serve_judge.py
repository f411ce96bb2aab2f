"""The judge server as a process: prints its address, and at the end what it has seen, as JSON.

Usage: python serve_judge.py [FAULTS], a JSON list; it serves until its standard input is closed.
"""

import json
import sys

from judge_server import judge_server


def main() -> None:
    faults = json.loads(sys.argv[1]) if len(sys.argv) > 1 else []
    faults = [tuple(fault) if isinstance(fault, list) else fault for fault in faults]
    with judge_server(faults=faults, hang_s=3.0, delay_s=0.02) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        times = server.completed.values()
        seen = {
            "requests": len(server.requests),
            "whole_replies": sum(times),
            "conversations": len(times),
            "most_replies_to_one": max(times, default=0),
            "busiest": server.busiest,
        }
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
