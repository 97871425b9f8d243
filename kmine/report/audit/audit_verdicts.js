/* Verdicts on the masks: kept in the browser's storage, saved to a file, loaded from one, undone. */
"use strict";

(() => {
  const FORMAT = "kmine-verdicts-1";
  const VERDICTS = ["accept", "reject", "unsure"];
  const KINDS = ["pseudo", "labeled"];

  /* key -> {kind, id, verdict or null, note, signature: of the reviewed mask, mended: [[class, run lengths] ...] or null}.
     A mended mask takes the place of the one that the run made, which is rejected. */
  const entries = new Map();
  const steps = []; // undo steps: lists of [key, previous verdict, previous note or null if unchanged, previous mended]
  let page, waiting, changed;
  const store = { works: true, unsaved: 0, at: null };
  const key = (kind, id) => `${kind}/${id}`;
  const name = () => `kmine-audit:${page.run_signature}`;

  /* `onChange` is called after verdicts of another tab of the same run were taken over. */
  function start(facts, onChange) {
    page = facts;
    changed = onChange;
    try {
      const text = localStorage.getItem(name());
      localStorage.setItem(name(), text ?? "");
      absorb(text);
    } catch {
      store.works = false; // denied, full or damaged: the page goes on without storage and shows a warning
    }
    window.addEventListener("storage", (event) => {
      if (event.key !== name() || waiting) return;
      try {
        absorb(event.newValue);
      } catch {
        return;
      }
      changed();
    });
    for (const leaving of ["pagehide", "visibilitychange"]) window.addEventListener(leaving, () => waiting && keep());
    window.addEventListener("beforeunload", (event) => {
      if (!store.works && store.unsaved) event.preventDefault();
    });
  }

  function absorb(text) {
    if (!text) return;
    const { entries: rows, at, unsaved } = JSON.parse(text);
    entries.clear();
    for (const [kind, id, verdict, note, signature, mended] of rows) {
      entries.set(key(kind, id), { kind, id, verdict, note, signature, mended: mended ?? null });
    }
    store.at = at;
    store.unsaved = unsaved;
  }

  function keep() {
    clearTimeout(waiting);
    waiting = 0;
    const rows = [...entries.values()].map((one) => [one.kind, one.id, one.verdict, one.note, one.signature, one.mended]);
    try {
      localStorage.setItem(name(), JSON.stringify({ entries: rows, at: store.at, unsaved: store.unsaved }));
    } catch {
      store.works = false;
      changed();
    }
  }

  function later() {
    if (store.works && !waiting) waiting = setTimeout(keep, 250);
  }

  /* The entry of a mask; null without one, or if the mask has changed since. */
  function get(item) {
    const found = entries.get(item.key);
    return found && found.signature === item.signature ? found : null;
  }

  function put(item, verdict, note, mended = null) {
    const before = get(item);
    if (verdict === null && !note) entries.delete(item.key);
    else entries.set(item.key, { kind: item.kind, id: item.id, verdict, note, signature: item.signature, mended });
    return [item.key, before ? before.verdict : null, null, before ? before.mended : null];
  }

  function set(item, verdict, mended = null) {
    const before = get(item);
    steps.push([put(item, verdict, before ? before.note : "", mended)]);
    store.unsaved += 1;
    later();
  }

  /* The verdict as a word for the list: `mended` for a mask that the reviewer has changed; undefined without any. */
  function state(item) {
    const entry = get(item);
    return entry?.mended ? "mended" : entry?.verdict;
  }

  function note(item, text) {
    const before = get(item);
    put(item, before ? before.verdict : null, text, before ? before.mended : null);
    store.unsaved += 1;
    later();
  }

  /* Undo the last step; returns the key of one of its masks, or null. `find`: key -> item. */
  function undo(find) {
    const step = steps.pop();
    if (!step) return null;
    for (const [which, verdict, text, mended] of step) {
      const item = find(which);
      const now = item && get(item);
      if (item) put(item, verdict, text ?? (now ? now.note : ""), mended);
    }
    store.unsaved += 1;
    later();
    return step[0][0];
  }

  function place(item) {
    store.at = item.key;
    later();
  }

  function count(items) {
    return items.reduce((sum, item) => sum + (get(item)?.verdict ? 1 : 0), 0);
  }

  /* The text of verdicts.json. Verdicts on masks that are gone or have changed are left out. */
  function text(items) {
    const verdicts = [];
    for (const item of items) {
      const entry = get(item);
      if (!entry?.verdict) continue;
      verdicts.push({
        sample_id: item.id,
        kind: item.kind,
        verdict: entry.verdict,
        mask_signature: item.signature,
        note: entry.note,
        ...(entry.mended ? { mended: entry.mended } : {}),
      });
    }
    return `${JSON.stringify({ format: FORMAT, run: page.run, run_signature: page.run_signature, verdicts }, null, 1)}\n`;
  }

  function save(items) {
    const address = URL.createObjectURL(new Blob([text(items)], { type: "application/json" }));
    const link = document.createElement("a");
    link.href = address;
    link.download = "verdicts.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
    store.unsaved = 0;
    later();
  }

  /* Import the verdicts of a file as one undo step; returns a summary. Throws an Error on an invalid file. */
  function read(content, find) {
    const wanted = `expected a verdicts.json of format ${FORMAT}, as Save writes it`;
    let file;
    try {
      file = JSON.parse(content);
    } catch {
      throw new Error(`${wanted}, got a file that is no JSON`);
    }
    if (file?.format !== FORMAT) throw new Error(`${wanted}, got format ${JSON.stringify(file?.format ?? null)}`);
    if (!Array.isArray(file.verdicts)) throw new Error(`${wanted}, got one without a list of verdicts`);
    file.verdicts.forEach((one, number) => {
      const sound =
        typeof one?.sample_id === "string" &&
        KINDS.includes(one.kind) &&
        VERDICTS.includes(one.verdict) &&
        typeof one.mask_signature === "string" &&
        ["string", "undefined"].includes(typeof (one.note ?? undefined)) &&
        (one.mended ?? []).every?.(([value, runs]) => Number.isInteger(value) && typeof runs === "string");
      if (!sound) throw new Error(`${wanted}, got ${JSON.stringify(one)} as verdict ${number + 1}`);
    });
    const step = [];
    let [unknown, stale] = [0, 0];
    for (const one of file.verdicts) {
      const item = find(key(one.kind, one.sample_id));
      if (!item) unknown += 1;
      else if (item.signature !== one.mask_signature) stale += 1;
      else {
        const before = get(item);
        put(item, one.verdict, one.note ?? "", one.mended?.length ? one.mended : null);
        step.push([item.key, before ? before.verdict : null, before ? before.note : "", before ? before.mended : null]);
      }
    }
    if (step.length) steps.push(step);
    later();
    return [
      `${step.length} verdict${step.length === 1 ? "" : "s"} read`,
      ...(stale ? [`${stale} left out: the mask has changed since`] : []),
      ...(unknown ? [`${unknown} left out: no such mask here`] : []),
      ...(file.run_signature === page.run_signature ? [] : ["the file belongs to another state of the run"]),
    ].join("; ");
  }

  kmineAudit.verdicts = Object.assign(store, { start, get, set, state, note, undo, place, count, text, save, read, key, VERDICTS });
})();
