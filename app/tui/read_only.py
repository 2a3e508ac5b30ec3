"""The app to look only: what an action may do then."""

from __future__ import annotations

from textual.dom import DOMNode

LOOKS = frozenset(
    """
    show-jobs show-config show-monitor show-data show-library show-system palette help theme quit
    list.down list.up list.first list.last list.page-down list.page-up
    ask.cancel ask.yes textview.close textview.copy textview.down textview.up
    choose.cancel choose.down choose.up
    jobs.open jobs.log jobs.command jobs.mark jobs.compare
    compare.back compare.cursor-left compare.cursor-right compare.cursor-shift-left
    compare.cursor-shift-right compare.log-y compare.smoother compare.rougher compare.down
    compare.up compare.read-again
    library.look-into-it library.copy-path
    monitor.jobs monitor.cursor-left monitor.cursor-right monitor.cursor-shift-left
    monitor.cursor-shift-right monitor.log-y monitor.smoother monitor.rougher monitor.log
    monitor.metrics monitor.samples monitor.error failureview.open-in-the-monitor
    gallery.back gallery.frame-back gallery.frame-on gallery.step-back gallery.step-on
    gallery.prompt gallery.prompt-back gallery.left-one gallery.play gallery.copy-path
    metriclist.close metriclist.down metriclist.up
    data.filter data.problems data.view data.copy-path data.notes data.frame-left data.frame-right
    data.all data.look-again data.decode data.open
    system.look-again system.copy
    config.filter config.toml config.back config.undo config.redo config.tier config.gpu
    config.diff config.problems config.command config.open
    lines.choose presets.choose presets.filter presets.more presets.back-up
    presetpicker.cancel presetpicker.leave presetpicker.give-way
    pathfield.complete pathfield.choice-up pathfield.choice-down pathfield.tree
    pathtree.cancel pathtree.folder-above pathtree.take
    wizard.back variantinput.choice-up variantinput.choice-down
    reviewstep.more reviewstep.back-up reviewstep.all-lines reviewstep.commands
    """.split()  # noqa: SIM905  (quoted one by one they are hard to read)
)
"""Actions that change nothing on the disk and start nothing that does."""
WRITES = frozenset(
    """
    jobs.stop jobs.save jobs.sample jobs.queue-again jobs.cancel-job jobs.later jobs.sooner
    jobs.pause jobs.new
    library.sample library.merge library.convert
    textview.write-to-a-file
    monitor.stop monitor.save monitor.sample
    data.caption
    config.reset config.save config.run config.editor config.preset
    wizard.next
    """.split()  # noqa: SIM905
)
"""The others. A test asks for every action to be in one of the two; what is in none is refused."""


def is_refused(target: DOMNode, action: str) -> bool:
    """Tell whether an action of ours would do more than look.

    Args:
        target: whose action it is.
        action: its name, without arguments and without the target.
    """
    method = getattr(type(target), f"action_{action}", None)
    if method is None or not str(getattr(method, "__module__", "")).startswith("app."):
        return False  # Textual's own move about, scroll and copy
    ids = {
        getattr(binding, "id", None)
        for owner in type(target).__mro__
        for binding in owner.__dict__.get("BINDINGS", ())
        if getattr(binding, "action", "").rpartition(".")[2].partition("(")[0] == action
    }
    return not ids or not ids <= LOOKS
