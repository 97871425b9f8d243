/* The list of masks: filter, order, and the rows on the screen. */
"use strict";

(() => {
  const { masks, view } = kmineAudit;
  const ROW = 68; // px, equal to the style sheet
  const SPARE = 4; // rows drawn beyond the edges
  const THUMB = [72, 56];

  const list = { items: [], shown: [], at: -1, pick: () => {}, verdictOf: () => null, details: null };
  let box, inner, settle;
  const rows = new Map(); // place in `shown` -> its element

  function start() {
    box = document.getElementById("list");
    inner = document.getElementById("rows");
    box.addEventListener("scroll", render, { passive: true });
    inner.addEventListener("click", (event) => {
      const row = event.target.closest("[data-place]");
      if (row) list.pick(Number(row.dataset.place));
    });
    new ResizeObserver(render).observe(box);
  }

  const fact = (item, name) => {
    const column = item.columns.get(name);
    return column === undefined ? null : item.row[column];
  };

  /* All text of a mask, in lower case. */
  function haystack(item) {
    if (item.text === undefined) {
      item.text = [item.id, item.kind, ...item.causes, ...item.row.slice(kmineAudit.FACTS)].join("\n").toLowerCase();
    }
    return item.text;
  }

  const OPERATIONS = {
    is: (value, wanted) => String(value ?? "").toLowerCase() === wanted.toLowerCase(),
    contains: (value, wanted) => String(value ?? "").toLowerCase().includes(wanted.toLowerCase()),
    "at least": (value, wanted) => value !== null && value !== "" && Number(value) >= Number(wanted),
    "at most": (value, wanted) => value !== null && value !== "" && Number(value) <= Number(wanted),
    "is not": (value, wanted) => String(value ?? "").toLowerCase() !== wanted.toLowerCase(),
  };

  /* `filter`: {text, kind, verdict, facts: [[name, operation, wanted] ...]}; empty entries match everything. */
  function matches(item, filter) {
    if (filter.kind && item.kind !== filter.kind) return false;
    const verdict = list.verdictOf(item) || "none";
    if (filter.verdict === "any" ? verdict === "none" : filter.verdict && verdict !== filter.verdict) return false;
    if (filter.text && !filter.text.toLowerCase().split(/\s+/).every((word) => haystack(item).includes(word))) return false;
    return filter.facts.every(([name, operation, wanted]) => !wanted || OPERATIONS[operation](fact(item, name), wanted));
  }

  const KEYS = { suspicion: (item) => item.suspicion, rank: (item) => item.rank, sample: (item) => item.id, kind: (item) => item.kind };
  const words = new Intl.Collator("en", { numeric: true });

  /* Missing values come last in both directions; ties keep the order of the run. */
  function order(items, name, falling) {
    const key = Object.hasOwn(KEYS, name) ? KEYS[name] : (item) => fact(item, name.slice(5));
    const sign = falling ? -1 : 1;
    const missing = (value) => value === null || value === undefined || value === "";
    const keyed = items.map((item) => [key(item), item]);
    keyed.sort(([a, one], [b, other]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b) || one.number - other.number;
      const by = typeof a === "number" && typeof b === "number" ? a - b : words.compare(String(a), String(b));
      return sign * by || one.number - other.number;
    });
    return keyed.map(([, item]) => item);
  }

  /* Filter and sort; the selected mask stays selected if it is still in the list. */
  function choose(filter, sorting, falling) {
    const selected = list.shown[list.at];
    list.shown = order(list.items.filter((item) => matches(item, filter)), sorting, falling);
    list.at = selected ? list.shown.indexOf(selected) : -1;
    for (const row of rows.values()) row.remove();
    rows.clear();
    inner.style.height = `${list.shown.length * ROW}px`;
    if (list.at >= 0) reveal();
    render();
  }

  function select(place) {
    const before = list.at;
    list.at = place;
    for (const one of [before, place]) refresh(one);
    reveal();
    render();
  }

  function reveal() {
    const top = list.at * ROW;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
  }

  function render() {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
    const last = Math.min(list.shown.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + SPARE);
    for (const [place, row] of rows) {
      if (place >= first && place < last) continue;
      row.remove();
      rows.delete(place);
    }
    for (let place = first; place < last; place++) {
      if (rows.has(place)) continue;
      const row = make(place);
      rows.set(place, row);
      inner.append(row);
    }
    if (list.at >= 0 && rows.has(list.at)) box.setAttribute("aria-activedescendant", `row-${list.at}`);
    else box.removeAttribute("aria-activedescendant");
    clearTimeout(settle);
    settle = setTimeout(thumbs, 80); // nothing is loaded while scrolling
  }

  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  /* A reason is `tag: detail`. */
  const tag = (cause) => cause.split(": ", 1)[0];

  function make(place) {
    const item = list.shown[place];
    const row = element("div", "row");
    row.id = `row-${place}`;
    row.dataset.place = place;
    row.setAttribute("role", "option");
    row.setAttribute("aria-setsize", list.shown.length);
    row.setAttribute("aria-posinset", place + 1);
    row.style.top = `${place * ROW}px`;
    const frame = element("div", "thumb");
    const lines = element("div", "lines");
    const name = element("bdi", "name", item.id);
    name.title = item.id;
    const tags = element("div", "tags");
    for (const cause of item.causes) tags.append(element("span", "tag", tag(cause)));
    if (!item.causes.length) tags.append(element("span", "soft", item.kind === "labeled" ? "given mask" : "pseudo mask"));
    lines.append(name, tags);
    const mark = element("div", "mark");
    mark.append(element("span", "verdict"), element("span", "suspicion", item.suspicion === null ? "–" : item.suspicion.toFixed(2)));
    lines.append(mark);
    row.append(frame, lines);
    dress(row, place);
    return row;
  }

  function dress(row, place) {
    const verdict = list.verdictOf(list.shown[place]);
    const label = row.querySelector(".verdict");
    label.textContent = verdict ? { accept: "✓ accepted", reject: "✗ rejected", unsure: "? unsure", mended: "✎ mended" }[verdict] : "not reviewed";
    label.dataset.verdict = verdict || "none";
    row.setAttribute("aria-selected", place === list.at);
  }

  /* Redraw the state of a row, if it is on the screen. */
  function refresh(place) {
    const row = rows.get(place);
    if (row) dress(row, place);
  }

  function refreshAll() {
    for (const [place, row] of rows) dress(row, place);
  }

  /* Thumbnails, with their mask, of the rows on the screen. */
  function thumbs() {
    for (const [place, row] of rows) {
      const frame = row.firstElementChild;
      if (frame.childElementCount) continue;
      const item = list.shown[place];
      const scale = Math.min(THUMB[0] / item.width, THUMB[1] / item.height);
      const [width, height] = [item.width, item.height].map((side) => Math.max(1, Math.round(side * scale)));
      const picture = element("img");
      picture.alt = "";
      picture.loading = "lazy";
      picture.decoding = "async";
      [picture.width, picture.height] = [width, height];
      picture.src = item.picture;
      frame.append(picture);
      list.details(item).then(([, , , layers]) => {
        if (!frame.isConnected || frame.childElementCount > 1) return;
        for (const [name, classId, text] of layers) {
          if (name !== (item.kind === "labeled" ? "given" : "pseudo") || classId === 255) continue;
          frame.append(masks.paint(masks.sample(text, item.height, item.width, height, width), view.COLOURS[name]));
        }
      }, () => {});
    }
  }

  kmineAudit.list = Object.assign(list, { start, choose, select, refresh, refreshAll, fact, render, tag, OPERATIONS });
})();
