"""Methods in which every rank holds all parameters, gradients and optimizer state.

    none         nothing is sent
    naive        after the backward, one parameter's gradient after another
    flat         after the backward, all gradients of one dtype at once
    bucketed     after the backward, in buckets
    overlapped   in buckets, each beside the rest of the backward, as soon as its gradients are
                 there (Li et al., PyTorch Distributed, arXiv:2006.15704)

All but `none` take the mean by the group's all-reduce, and divide once.

module, group: as in `Wrapper`. bucket_mib: the most MiB of a bucket; a parameter that is larger has
one to itself. unused: what a parameter without a gradient is: "error", which names it, or "zero",
which averages zeros, so that a parameter used on some ranks only has the right mean.
"""

from blockshock.data_parallel import buckets
from blockshock.data_parallel.buckets import MIB, Gradients, Loose
from blockshock.data_parallel.sends import start_mean
from blockshock.data_parallel.wrapper import Wrapper


class NoSync(Wrapper):
    """Gradients stay each rank's own: one process, or the computation alone for comparison.

    group: is not used; none is needed.
    """

    method = "none"
    alone = True

    def __init__(self, module, *, group=None):
        super().__init__(module, group)


class Naive(Wrapper):
    """Gradients are ordinary tensors, and each is sent and waited for by itself."""

    method = "naive"

    def __init__(self, module, *, group=None, unused="error"):
        super().__init__(module, group, unused=unused)
        self.gradients = Gradients(module, _one_by_one(group), Loose, unused=unused)

    @staticmethod
    def unsupported(*, device_type, ranks, unused="error"):
        """None, or why it cannot run: value, rule, fix."""
        return buckets.unsupported(unused=unused)


class Flat(Wrapper):
    """Gradients are views of one buffer a dtype, which is sent after the backward."""

    method = "flat"

    def __init__(self, module, *, group=None, unused="error"):
        super().__init__(module, group, unused=unused)
        self.gradients = Gradients(module, _sender(group), unused=unused)

    @staticmethod
    def unsupported(*, device_type, ranks, unused="error"):
        """None, or why it cannot run: value, rule, fix."""
        return buckets.unsupported(unused=unused)


class Bucketed(Wrapper):
    """Gradients are views of buckets, which are sent after the backward."""

    method = "bucketed"

    def __init__(self, module, *, group=None, bucket_mib=25.0, unused="error"):
        super().__init__(module, group, bucket_mib=bucket_mib, unused=unused)
        self.gradients = Gradients(module, _sender(group), most=bucket_mib * MIB, unused=unused)

    @staticmethod
    def unsupported(*, device_type, ranks, bucket_mib=25.0, unused="error"):
        """None, or why it cannot run: value, rule, fix."""
        return buckets.unsupported(bucket_mib, unused)


class Overlapped(Wrapper):
    """Gradients are views of buckets, and each is sent in the backward, once it is filled.

    Between the backward and `finish_gradient_sync` gradients are on their way: neither read nor
    write them.
    """

    method = "overlapped"

    def __init__(self, module, *, group=None, bucket_mib=25.0, unused="error"):
        super().__init__(module, group, bucket_mib=bucket_mib, unused=unused)
        self.gradients = Gradients(
            module, _sender(group), most=bucket_mib * MIB, unused=unused, early=True
        )

    @staticmethod
    def unsupported(*, device_type, ranks, bucket_mib=25.0, unused="error"):
        """None, or why it cannot run: value, rule, fix."""
        return buckets.unsupported(bucket_mib, unused)


def _sender(group):
    return lambda bucket: start_mean(bucket.buffer, group)


def _one_by_one(group):
    def send(bucket):
        for gradient in [parameter.grad for parameter in bucket.parameters]:
            plain = gradient.contiguous()  # a collective wants no other strides
            start_mean(plain, group)()
            if plain is not gradient:
                gradient.copy_(plain)
        return lambda: None

    return send
