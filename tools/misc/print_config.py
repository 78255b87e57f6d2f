"""Print a config with everything it inherits and every override applied, as MMDetection's tool of this name does.

Example:

    python tools/misc/print_config.py configs/faster_rcnn/faster-rcnn_r50_fpn_ubn-backbone_1x_coco.py
"""

import argparse

import mmubn  # noqa: F401 - registers UBN for configs that do not import it
from mmubn.cli import UsageError, add_config_arguments, add_debug_argument, load_config, run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.RawTextHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('--save-path', metavar='FILE', help='also write the config to this .py, .json or .yml file')
    add_debug_argument(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.save_path is not None and not args.save_path.endswith(('.py', '.json', '.yml')):
        raise UsageError(f'--save-path must end in .py, .json or .yml, got {args.save_path}.')
    cfg = load_config(args)
    print(cfg.pretty_text)
    if args.save_path is not None:
        cfg.dump(args.save_path)


if __name__ == '__main__':
    run_tool(parse_args, main)
