"""What starts the servers of a placement, and what sends requests to them, as files."""

import json

from lora_capacity.engines import emitted
from lora_capacity.fleet.placement import Placement


def exported(placement: Placement) -> dict[str, str]:
    """Return the files of a placement, by name.

    ``NAME.yaml`` for ``vllm serve --config`` of each server; ``launch.sh`` with a line for each; ``deployments.yaml``
    with a Kubernetes Deployment of each; ``routes.json``: ``{"servers": {name: {"pool", "adapters", "max_loras",
    "max_cpu_loras"}}, "adapters": {name: [{"server", "share"}]}}``, for a router.

    Args:
        placement: The placement.
    """
    servers = placement.servers
    files = {f"{server.name}.yaml": emitted(server.config, server.model, "config") + "\n" for server in servers}
    lines = [f"# {server.name}\n{emitted(server.config, server.model, 'command')}" for server in servers]
    deployments = [emitted(server.config, server.model, "k8s", server.name) for server in servers]
    table = {
        "servers": {
            server.name: {
                "pool": server.pool,
                "adapters": [name for name, _ in server.adapters],
                "max_loras": server.config.max_loras,
                "max_cpu_loras": server.config.max_cpu_loras,
            }
            for server in servers
        },
        "adapters": placement.routes,
    }
    return files | {
        "launch.sh": "\n".join(lines) + "\n",
        "deployments.yaml": "\n---\n".join(deployments) + "\n",
        "routes.json": json.dumps(table, indent=2) + "\n",
    }
