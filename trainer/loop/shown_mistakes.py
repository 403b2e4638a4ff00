"""The mistakes of an evaluation as images that can be shown."""

from convoy.printable import printable
from trainer.evaluation.evaluate import Evaluation
from trainer.loop.run import Run
from trainer.records.mistakes import Mistake


def mistakes_in_validation(run: Run, validation: Evaluation, most: int) -> list[Mistake]:
    """Returns at most so many mistakes, those with the highest confidence first."""
    worst, classes = validation.worst_mistakes(most), run.dataset.classes
    images = run.validation_images.take(run.validation_indices[worst])
    return [
        Mistake(
            pixels=(pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy(),
            label=printable(classes[int(validation.labels[position])]),
            predicted=printable(classes[int(validation.predicted[position])]),
            confidence=float(validation.confidence[position]),
        )
        for position, pixels in zip(worst.tolist(), images, strict=True)
    ]
