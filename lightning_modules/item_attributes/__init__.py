"""What the pictures of items show, asked attribute by attribute."""

from lightning_modules.item_attributes.module import ItemAttributesModule

__all__ = ["ItemAttributesModule"]
