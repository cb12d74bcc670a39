"""Readers and writers of checkpoints, behind one small protocol."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3jax.checkpoints.copying import write_safetensors as write_safetensors
    from m3jax.checkpoints.digest import ALGORITHM as ALGORITHM
    from m3jax.checkpoints.digest import TensorDigest as TensorDigest
    from m3jax.checkpoints.digest import digest_checkpoint as digest_checkpoint
    from m3jax.checkpoints.digest import digest_file as digest_file
    from m3jax.checkpoints.digest import digest_tensor as digest_tensor
    from m3jax.checkpoints.locate import ModelDirectory as ModelDirectory
    from m3jax.checkpoints.locate import companions as companions
    from m3jax.checkpoints.locate import locate_model as locate_model
    from m3jax.checkpoints.locate import sketch_model as sketch_model
    from m3jax.checkpoints.msgpack import open_msgpack as open_msgpack
    from m3jax.checkpoints.msgpack_writer import write_msgpack as write_msgpack
    from m3jax.checkpoints.opening import open_checkpoint as open_checkpoint
    from m3jax.checkpoints.orbax import open_orbax as open_orbax
    from m3jax.checkpoints.orbax_writer import write_orbax as write_orbax
    from m3jax.checkpoints.protocol import DTYPES as DTYPES
    from m3jax.checkpoints.protocol import BytesLike as BytesLike
    from m3jax.checkpoints.protocol import Checkpoint as Checkpoint
    from m3jax.checkpoints.protocol import FileFingerprint as FileFingerprint
    from m3jax.checkpoints.protocol import TensorInfo as TensorInfo
    from m3jax.checkpoints.protocol import as_bytes as as_bytes
    from m3jax.checkpoints.protocol import natural_key as natural_key
    from m3jax.checkpoints.pytorch import open_pytorch as open_pytorch
    from m3jax.checkpoints.safetensors import open_safetensors as open_safetensors
    from m3jax.checkpoints.shards import ShardWriter as ShardWriter
    from m3jax.checkpoints.shards import header_digest as header_digest
    from m3jax.checkpoints.shards import parse_size as parse_size
    from m3jax.checkpoints.shards import plan_shards as plan_shards
    from m3jax.checkpoints.shards import write_index as write_index
    from m3jax.checkpoints.shards import write_outline as write_outline

# Imported when first used, so that the command line can name formats without numpy.
_HOMES = {
    "ALGORITHM": "digest",
    "BytesLike": "protocol",
    "Checkpoint": "protocol",
    "DTYPES": "protocol",
    "FileFingerprint": "protocol",
    "ModelDirectory": "locate",
    "ShardWriter": "shards",
    "TensorDigest": "digest",
    "TensorInfo": "protocol",
    "as_bytes": "protocol",
    "companions": "locate",
    "digest_checkpoint": "digest",
    "digest_file": "digest",
    "digest_tensor": "digest",
    "header_digest": "shards",
    "locate_model": "locate",
    "natural_key": "protocol",
    "open_checkpoint": "opening",
    "open_msgpack": "msgpack",
    "open_orbax": "orbax",
    "open_pytorch": "pytorch",
    "open_safetensors": "safetensors",
    "parse_size": "shards",
    "plan_shards": "shards",
    "sketch_model": "locate",
    "write_index": "shards",
    "write_msgpack": "msgpack_writer",
    "write_orbax": "orbax_writer",
    "write_outline": "shards",
    "write_safetensors": "copying",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'm3jax.checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module(f"m3jax.checkpoints.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
