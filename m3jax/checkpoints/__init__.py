"""Readers and writers of checkpoints, behind one small protocol."""

from m3jax.checkpoints.copying import write_safetensors
from m3jax.checkpoints.digest import ALGORITHM, TensorDigest, digest_checkpoint, digest_file, digest_tensor
from m3jax.checkpoints.locate import ModelDirectory, companions, locate_model, sketch_model
from m3jax.checkpoints.msgpack import open_msgpack, write_msgpack
from m3jax.checkpoints.opening import open_checkpoint
from m3jax.checkpoints.orbax import open_orbax, write_orbax
from m3jax.checkpoints.protocol import (
    DTYPES,
    BytesLike,
    Checkpoint,
    FileFingerprint,
    TensorInfo,
    as_bytes,
    natural_key,
)
from m3jax.checkpoints.safetensors import open_safetensors
from m3jax.checkpoints.shards import ShardWriter, parse_size, plan_shards, write_index

__all__ = [
    "ALGORITHM",
    "DTYPES",
    "BytesLike",
    "Checkpoint",
    "FileFingerprint",
    "ModelDirectory",
    "ShardWriter",
    "TensorDigest",
    "TensorInfo",
    "as_bytes",
    "companions",
    "digest_checkpoint",
    "digest_file",
    "digest_tensor",
    "locate_model",
    "natural_key",
    "open_checkpoint",
    "open_msgpack",
    "open_orbax",
    "open_safetensors",
    "parse_size",
    "plan_shards",
    "sketch_model",
    "write_index",
    "write_msgpack",
    "write_orbax",
    "write_safetensors",
]
