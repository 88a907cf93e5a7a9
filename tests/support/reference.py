"""A slow, readable Adam in float64 NumPy, the oracle of this suite.

It is written from the papers and shares no code with the package:

- Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015: Algorithm 1, and the last
  paragraph of section 2 for the form with epsilon-hat.
- Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019: Algorithm 2, which
  prints L2 regularization and decoupled decay side by side.
- Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018: AMSGrad.

`test_reference.py` checks it against torch, optax and Keras.
"""

import numpy as np


class Adam:
    """Minimizes from `parameters`, a list of arrays; each `step(gradients)` renews that list.

    A hyperparameter is a number or a function of the count of earlier calls of `step`.
    `constraints` holds a function or None for each parameter.
    """

    def __init__(
        self,
        parameters,
        learning_rate=0.001,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        amsgrad=False,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        decoupled_weight_decay=True,
        epsilon_hat=True,
        maximize=False,
        constraints=None,
    ):
        self.parameters = [np.array(p, dtype="float64") for p in parameters]
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.amsgrad = amsgrad
        self.weight_decay = weight_decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.use_ema = use_ema
        self.ema_momentum = ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.loss_scale_factor = loss_scale_factor
        self.accumulation = gradient_accumulation_steps or 1
        self.decoupled_weight_decay = decoupled_weight_decay
        self.epsilon_hat = epsilon_hat
        self.maximize = maximize
        self.constraints = constraints or [None] * len(parameters)

        self.calls = 0  # of `step`
        self.t = 0  # updates made: the timestep of Algorithm 1
        self.m = [np.zeros_like(p) for p in self.parameters]
        self.v = [np.zeros_like(p) for p in self.parameters]
        self.maximum = [np.zeros_like(p) for p in self.parameters]
        self.sum = [np.zeros_like(p) for p in self.parameters]
        self.average = None

    def step(self, gradients):
        gradients = [np.asarray(g, dtype="float64") for g in gradients]
        if self.loss_scale_factor is not None:
            gradients = [g / self.loss_scale_factor for g in gradients]
        self.sum = [s + g for s, g in zip(self.sum, gradients, strict=True)]
        if (self.calls + 1) % self.accumulation == 0:
            self._update(self._clip([s / self.accumulation for s in self.sum]))
            self.sum = [np.zeros_like(p) for p in self.parameters]
        self.calls += 1

    def _update(self, gradients):
        self.t += 1
        for i, gradient in enumerate(gradients):
            self._update_parameter(i, gradient)
            if self.constraints[i] is not None:
                self.parameters[i] = self.constraints[i](self.parameters[i])
        if self.use_ema:
            self._average()

    def _clip(self, gradients):
        if self.clipvalue is not None:
            return [np.clip(g, -self.clipvalue, self.clipvalue) for g in gradients]
        if self.clipnorm is not None:
            return [shrink(g, norm(g), self.clipnorm) for g in gradients]
        if self.global_clipnorm is not None:
            total = norm(np.concatenate([g.ravel() for g in gradients]))
            return [shrink(g, total, self.global_clipnorm) for g in gradients]
        return gradients

    def _update_parameter(self, i, g):
        t, beta_1, beta_2 = self.t, self._now(self.beta_1), self._now(self.beta_2)
        lr = self._now(self.learning_rate)
        decay = 0.0 if self.weight_decay is None else self._now(self.weight_decay)
        if self.maximize:
            g = -g
        if self.decoupled_weight_decay:
            self.parameters[i] = self.parameters[i] - lr * decay * self.parameters[i]
        else:
            g = g + decay * self.parameters[i]
        self.m[i] = beta_1 * self.m[i] + (1 - beta_1) * g
        self.v[i] = beta_2 * self.v[i] + (1 - beta_2) * g**2
        m_hat = self.m[i] / (1 - beta_1**t)
        self.parameters[i] = self.parameters[i] - lr * m_hat / self._denominator(i, beta_2)

    def _denominator(self, i, beta_2):
        """What Algorithm 1 divides m_hat by: sqrt(v_hat) + epsilon, or a variant of it."""
        correction = 1 - beta_2**self.t
        epsilon = self._now(self.epsilon)
        if self.amsgrad == "corrected":
            self.maximum[i] = np.maximum(self.maximum[i], self.v[i] / correction)
            return np.sqrt(self.maximum[i]) + epsilon
        second_moment = self.v[i]
        if self.amsgrad:
            second_moment = self.maximum[i] = np.maximum(self.maximum[i], self.v[i])
        if self.epsilon_hat:
            # The paper's alpha_t * m / (sqrt(v) + epsilon_hat), alpha_t's factor moved down here.
            return (np.sqrt(second_moment) + epsilon) / np.sqrt(correction)
        return np.sqrt(second_moment / correction) + epsilon

    def _average(self):
        """As Keras: the first update starts the average from the parameters themselves."""
        if self.average is None:
            self.average = self.parameters
        keep = self.ema_momentum
        self.average = [
            keep * a + (1 - keep) * p for a, p in zip(self.average, self.parameters, strict=True)
        ]
        if self.ema_overwrite_frequency and self.t % self.ema_overwrite_frequency == 0:
            self.parameters = list(self.average)

    def _now(self, hyperparameter):
        return hyperparameter(self.calls) if callable(hyperparameter) else hyperparameter


def norm(array):
    return np.sqrt(np.sum(array**2))


def shrink(array, length, limit):
    return array * (limit / length) if length > limit else array
