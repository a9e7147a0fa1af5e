"""What a data set has to keep to, and what is done about that which does not: the one list, for parsers and doctor."""

from typing import NamedTuple

from onestage.types import Effect, Finding


class Rule(NamedTuple):
    """One kind of finding."""

    name: str
    effect: Effect
    remedy: str

    def broken(self, place: str, problem: str, num_items: int = 1) -> Finding:
        """Return the finding. place: file, and what in it; problem: what is there, and what should be."""
        return Finding(self.name, self.effect, place, problem, self.remedy, num_items)


# Stop a training. Most errors of a file are raised by its parser, with a remedy of their own.
FILE = Rule("annotation file", "error", "Correct the file.")
CLASSES_DIFFER = Rule("classes differ", "error", "Give every split the same categories: ids, names and order.")
UNKNOWN_CLASS = Rule(
    "class unknown in training", "error", "Correct the names, or set data.class_names to all that there are."
)
NO_OBJECTS = Rule("no objects", "error", "Is it the annotation file of this data set, and the training split?")
LEAKED_COPY = Rule("copy in two splits", "error", "Leave it out of one split, or the score counts what was seen.")

# Leave out one box. Corrected in a copy by `onestage doctor --fix-to`.
BOX_NOT_FINITE = Rule("box not finite", "left out", "Correct the box, or leave it out of the file.")
BOX_EMPTY = Rule("box without size", "left out", "Draw the box again, or leave it out of the file.")
BOX_OUTSIDE = Rule("box outside", "left out", "Correct the box, or the image's width and height.")
OBJECT_MALFORMED = Rule("object malformed", "left out", "Correct the object, or leave it out of the file.")

# Leave out one image.
IMAGE_MISSING = Rule("image missing", "left out", "Put the image there, or take it out of the annotations or the list.")
XML_MALFORMED = Rule("XML malformed", "left out", "Export the file again.")
XML_ENTITIES = Rule(
    "XML with entities", "left out", "Entities can read other files and fill the memory: see where the file is from."
)
LABEL_MALFORMED = Rule("label file malformed", "left out", "Export the file again, as UTF-8 text.")
IMAGE_UNREADABLE = Rule("image unreadable", "left out", "Replace the file, or remove it from the data set.")
IMAGE_TOO_SMALL = Rule("image too small", "left out", "Replace the file, or remove it from the data set.")
IMAGE_SIZE_DIFFERS = Rule("image size", "left out", "Put the original image back, or annotate this one anew.")

# Worth knowing; training goes on as the problem says.
IDS_REPEATED = Rule("ids repeated", "warning", "Give every annotation its own id; other tools lose objects over it.")
IDS_AS_TEXT = Rule("ids as text", "warning", "Write ids as integers; other tools compare them with numbers.")
ID_ZERO = Rule("id 0 or none", "note", "Number annotations from 1; COCO's own tools lose the object with id 0.")
ROOT_CATEGORY = Rule("root category", "note", "Nothing needs to be done.")
AREA_WRONG = Rule(
    "area wrong", "note", "Nothing needs to be done: it decides only in which size range an object counts."
)
BOX_CLIPPED = Rule("box clipped", "warning", "Check that width and height of these images are right.")
BOX_REPEATED = Rule("box repeated", "warning", "Remove the copies; each is one more object to find.")
BOX_TINY = Rule(
    "box under 1 px", "warning", "Train at a larger image_size, or in tiles: such an object cannot be seen."
)
ZERO_BASED = Rule("zero-based boxes", "warning", "Export boxes as VOC has them, counted from 1.")
NO_XML = Rule("image without XML", "note", "They are trained on as images without objects; is that so?")
NO_LABEL = Rule("image without label file", "note", "They are trained on as images without objects; is that so?")
POLYGON = Rule("outline", "note", "Nothing needs to be done: the box around it is used.")
OTHER_FILE_NAME = Rule("other file name", "note", "Nothing needs to be done: the XML's own name decides.")
NO_OBJECT_IMAGES = Rule("image without objects", "note", "They are trained on as background; is that so?")
MANY_OBJECTS = Rule("many objects", "warning", "Raise the detector's max_detections above it.")
SIMILAR_NAMES = Rule("similar class names", "warning", "Write the class in one way.")
ONE_SPLIT_CLASS = Rule("class in one split", "warning", "Split anew, by class: what is not in both is not measured.")
RARE_CLASS = Rule("rare class", "warning", "Collect more, or leave the class out; its score will be mostly chance.")
SAME_SPLIT = Rule("same images in two splits", "warning", "Give the splits images of their own.")
LEAKED_LIKENESS = Rule("near copy in two splits", "warning", "Look at the pair; leave one out if it is one scene.")
FIRST_FRAME = Rule("animation", "warning", "Only the first frame is used; save the others as images of their own.")
OTHER_SUFFIX = Rule("suffix of another format", "note", "Nothing needs to be done: the content decides.")
TURNED = Rule("turned by EXIF", "note", "Nothing needs to be done: it is turned as the annotated size says.")
EXTREME_SHAPE = Rule("extreme shape", "warning", "It is squeezed into a square: cut it into tiles.")
UNREACHED_BOX = Rule("box no anchor reaches", "warning", "Try `onestage anchors`, a larger image_size, or tiles.")

RULES = {rule.name: rule for rule in tuple(globals().values()) if isinstance(rule, Rule)}
