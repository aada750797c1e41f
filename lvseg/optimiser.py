"""Adam with what a training step needs around it, the same on either Keras, on one device or many.

Keras' own optimisers differ between Keras 2.15 and 3 in loss scaling, in where gradients are clipped, and in who adds
them up over devices; this one leaves the update itself to TensorFlow's fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import tensorflow as tf

Schedule = Literal["constant", "cosine", "polynomial", "step"]
EPSILON = 1e-7
POLYNOMIAL_POWER = 0.9  # nnU-Net's (Isensee et al., 2021)
# Micikevicius et al., 2018: begin high, halve at an overflow, double after so many steps without one.
FIRST_LOSS_SCALE, STEPS_TO_DOUBLE = 2.0**15, 2000


def learning_rate(
    step: tf.Tensor,
    peak: float,
    schedule: Schedule,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: Sequence[int] = (),
    decay_factor: float = 0.1,
) -> tf.Tensor:
    """The learning rate of a step, float32 scalar.

    Args:
        step: int64 scalar, 0 for the first.
        peak: the highest rate; warm-up rises to it linearly.
        schedule: "constant"; "cosine" (Loshchilov and Hutter, 2017) and "polynomial" end at 0 after `steps`; "step"
            multiplies by `decay_factor` after each of `decay_steps`.
    """
    done = tf.cast(step, tf.float64)
    share = tf.clip_by_value((done - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    if schedule == "cosine":
        factor = 0.5 * (1.0 + tf.cos(math.pi * share))
    elif schedule == "polynomial":
        factor = (1.0 - share) ** POLYNOMIAL_POWER
    elif schedule == "step":
        passed = tf.reduce_sum(tf.cast(done >= tf.constant(list(decay_steps), tf.float64), tf.float64))
        factor = tf.constant(decay_factor, tf.float64) ** passed
    else:
        factor = tf.ones_like(share)
    rising = tf.minimum((done + 1.0) / (warmup_steps + 1.0), 1.0)
    return tf.cast(peak * factor * rising, tf.float32)


class Adam:
    """Adam (Kingma and Ba, 2015) over all trainable variables of a model.

    Args:
        variables: float32, in the order of the gradients; created under the same distribution strategy.
        frozen: for each variable, how many steps it stays as it is; its own count of updates begins after them.
        beta_1, beta_2: decay of the moments.
        clip_norm: bound of all gradients' norm together (Pascanu et al., 2013), or None.
        scales_loss: whether the loss is multiplied before its gradients are taken, so that float16 holds them.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        frozen: Sequence[int],
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        clip_norm: float | None = None,
        scales_loss: bool = False,
    ) -> None:
        self._variables = [tf_variable(variable) for variable in variables]
        self._frozen = list(frozen)
        self._betas, self._clip_norm, self._scales_loss = (beta_1, beta_2), clip_norm, scales_loss
        self.first = [_state(tf.zeros(variable.shape)) for variable in self._variables]
        self.second = [_state(tf.zeros(variable.shape)) for variable in self._variables]
        # How often the variables that are frozen so long were updated; a step that overflows is none.
        self.updates = {str(start): _state(0, tf.int64) for start in sorted(set(self._frozen))}
        self.loss_scale = _state(FIRST_LOSS_SCALE if scales_loss else 1.0)
        self.steps_without_overflow = _state(0, tf.int64)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {
            "first": self.first,
            "second": self.second,
            "updates": self.updates,
            "loss_scale": self.loss_scale,
            "steps_without_overflow": self.steps_without_overflow,
        }

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """The loss whose gradients `apply` takes."""
        return loss * self.loss_scale if self._scales_loss else loss

    def apply(self, gradients: Sequence[tf.Tensor], rate: tf.Tensor, step: tf.Tensor, usable: tf.Tensor) -> tf.Tensor:
        """Updates the variables in a replica's step.

        Args:
            gradients: of the scaled loss, already added up over all devices.
            rate: learning rate, float32 scalar; step: of training, int64 scalar.
            usable: bool scalar, the same on all devices; False leaves all as it is.

        Returns:
            Whether all gradients were finite, bool scalar; where not, nothing was updated.
        """
        gradients = [
            tf.where(
                step >= start, tf.cast(gradient, tf.float32) / self.loss_scale, tf.zeros_like(gradient, tf.float32)
            )
            if start or self._scales_loss
            else gradient
            for gradient, start in zip(gradients, self._frozen, strict=True)
        ]
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm)
        good = finite & usable
        if self._clip_norm is not None:
            gradients = [gradient * tf.minimum(1.0, self._clip_norm / (norm + 1e-6)) for gradient in gradients]
        starts = {start: good & (step >= start) for start in set(self._frozen)}
        for start, active in starts.items():
            self.updates[str(start)].assign_add(tf.cast(active, tf.int64))
        context = tf.distribute.get_replica_context()
        for variable, first, second, gradient, start in zip(
            self._variables, self.first, self.second, gradients, self._frozen, strict=True
        ):
            context.merge_call(
                self._update, (variable, first, second, gradient, rate, starts[start], self.updates[str(start)])
            )
        self._rescale(finite)
        return finite

    def _update(self, strategy: Any, variable: Any, first: Any, second: Any, *given: tf.Tensor) -> None:
        """Everything is one kernel call; where not `active` its numbers make it change nothing."""

        def update(
            own: tf.Variable,
            first: tf.Variable,
            second: tf.Variable,
            gradient: tf.Tensor,
            rate: tf.Tensor,
            active: tf.Tensor,
            count: tf.Tensor,
        ) -> None:
            beta_1, beta_2 = (tf.where(active, tf.constant(beta), 1.0) for beta in self._betas)
            updates = tf.cast(tf.maximum(tf.convert_to_tensor(count), 1), tf.float32)
            tf.raw_ops.ResourceApplyAdam(
                var=own.handle,
                m=first.handle,
                v=second.handle,
                beta1_power=tf.constant(self._betas[0]) ** updates,
                beta2_power=tf.constant(self._betas[1]) ** updates,
                lr=tf.where(active, rate, 0.0),
                beta1=beta_1,
                beta2=beta_2,
                epsilon=EPSILON,
                grad=tf.math.multiply_no_nan(
                    gradient, tf.cast(active, gradient.dtype)
                ),  # 0 for what is not finite, too
                use_locking=False,
                use_nesterov=False,
            )

        strategy.extended.update(variable, update, (first, second, *given), group=True)

    def _rescale(self, finite: tf.Tensor) -> None:
        if not self._scales_loss:
            return
        count = tf.where(finite, tf.convert_to_tensor(self.steps_without_overflow) + 1, 0)
        doubles = count >= STEPS_TO_DOUBLE
        scale = tf.convert_to_tensor(self.loss_scale)
        self.loss_scale.assign(tf.where(finite, tf.where(doubles, 2.0 * scale, scale), tf.maximum(0.5 * scale, 1.0)))
        self.steps_without_overflow.assign(tf.where(doubles, tf.zeros_like(count), count))


def _state(value: Any, dtype: tf.DType = tf.float32) -> tf.Variable:
    """A variable that all devices hold the same value of."""
    return tf.Variable(value, dtype=dtype, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


def tf_variable(variable: Any) -> Any:
    """TensorFlow's variable of a Keras one: itself in Keras 2.15, wrapped in Keras 3."""
    return variable.value if isinstance(getattr(type(variable), "value", None), property) else variable
