"""Which operations of a traced function have kernels for GPUs; this can be told without one."""

from collections.abc import Iterator

import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework import kernels


def nodes(function: tf.types.experimental.ConcreteFunction) -> Iterator[NodeDef]:
    """Every operation of a traced function and of all that it calls, loop bodies among them."""
    graph = function.graph.as_graph_def()
    yield from graph.node
    for called in graph.library.function:
        yield from called.node_def


def runs_on_gpu(node: NodeDef) -> bool:
    """Whether a kernel for GPUs (or for any device) is registered for this operation with the dtypes it has here."""
    if node.op == "Const" and node.attr["dtype"].type == tf.string.as_datatype_enum:
        return True  # the messages of Addons' assertions: Assert reads them on the host, whatever the device
    for kernel in kernels.get_registered_kernels_for_op(node.op).kernel:
        if kernel.device_type in ("GPU", "DEFAULT") and all(
            node.attr[constraint.name].type in constraint.allowed_values.list.type for constraint in kernel.constraint
        ):
            return True
    return False


def without_gpu_kernel(function: tf.types.experimental.ConcreteFunction) -> list[tuple[str, str]]:
    """(operation, name) of all that would run on the host."""
    return sorted({(node.op, node.name) for node in nodes(function) if not runs_on_gpu(node)})
