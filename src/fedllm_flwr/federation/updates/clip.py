"""Clipping of an update's L2 norm at the client."""

from fedllm_flwr.errors import NotFiniteError
from fedllm_flwr.federation.updates.transform import Passage, Stage, UpdateTransform
from fedllm_flwr.params import Groups
from fedllm_flwr.privacy.clipping import clipped


class Clip(UpdateTransform):
    """Scales an update, with the rule's further groups, to an L2 norm of at most ``privacy.clip``.

    The norm is over all tensors of all groups together (McMahan et al. 2018, "Learning
    Differentially Private Recurrent Language Models"). A contribution counts in the sum as the
    server clips it (`federation.mechanism`); the client's clip keeps larger ones from leaving it.
    """

    stage = Stage.CLIP

    def client_end(self, groups: Groups, passage: Passage) -> Groups:
        """The clipped groups.

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """
        try:
            return clipped(groups, self.config.privacy.clip)
        except NotFiniteError as error:
            text = (
                f"{error}: privacy.clip={self.config.privacy.clip:g} bounds no such update; lower "
                "training.learning_rate"
            )
            raise NotFiniteError(text, text) from error
