"""What the pictures of items show, in words."""

from lightning_modules.item_pictures.module import ItemPicturesModule

__all__ = ["ItemPicturesModule"]
