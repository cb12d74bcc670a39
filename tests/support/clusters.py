"""Merges by several processes of the command line, joined through a coordinator on this machine."""

import json
import os
import socket
import subprocess
import sys

import jax

from support.directories import recipe

SHAPES = {f"model.layers.{i}.w": (256, 300 + i) for i in range(12)} | {"model.embed.weight": (700, 257)}
SHARD = 300_000  # bytes: about eight files
HEARTBEAT = 5


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(file, out, index, count, port, *options, devices=1):
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "m3jax", "merge", str(file), str(out), "--distributed"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(index)]
    command += ["--heartbeat-timeout", str(HEARTBEAT), "--max-shard-size", str(SHARD), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_all(file, out, count, *options, devices=1):
    """Exit codes, outputs and errors of all processes."""
    port = free_port()
    running = [start(file, out, index, count, port, *options, devices=devices) for index in range(count)]
    ended = [process.communicate(timeout=300) for process in running]
    return [process.returncode for process in running], [out for out, _ in ended], [err for _, err in ended]


def recipe_file(place, tmp_path, keys):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(place, **keys)))
    return file
