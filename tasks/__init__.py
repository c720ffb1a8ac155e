"""What one site learns. Nothing here knows of federation, of Flower, of Ray or of Hydra."""

from conf.table import Table

TASKS = Table(
    "task",
    {
        "classification": "tasks.classification:Classification",
        "gan": "tasks.gan:Gan",
        "pix2pix": "tasks.translation:Translation",
        "cyclegan": "tasks.translation:Unpaired",
        "segmentation": "tasks.segmentation:Segmentation",
    },
)
