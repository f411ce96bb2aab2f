"""A Ray cluster of two nodes on this machine: prints its address, ends when its input is closed.

Each node has one CPU and, as Ray believes, one GPU. A process of its own, because Ray settles at
its import whether it asks for a token.
"""

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    node = {"num_cpus": 1, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        print(cluster.address, flush=True)
        sys.stdin.read()
        alive = all(node.any_processes_alive() for node in cluster.list_all_nodes())
        print("alive" if alive else "dead", flush=True)
    finally:
        cluster.shutdown()
