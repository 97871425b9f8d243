/* The filter bar above the list. */
"use strict";

(() => {
  const { list } = kmineAudit;
  const FEW = 40; // values that fit in a menu
  const $ = (id) => document.getElementById(id);
  const written = (name) => name.replaceAll("_", " ");
  let changed, facts, waiting;

  /* `onChange` is called after each change; `values` maps the name of a fact to the set of its first values. */
  function start(onChange, values) {
    changed = onChange;
    facts = values;
    $("text").addEventListener("input", soon);
    for (const id of ["kind", "verdict-filter", "reason"]) $(id).addEventListener("change", changed);
    $("condition").addEventListener("click", add);
    $("clear").addEventListener("click", clear);
  }

  /* The filter, as an argument of `list.choose`. */
  function read() {
    const rows = [...$("conditions").children].map((row) => [...row.querySelectorAll("select, input")].map((one) => one.value));
    if ($("reason").value) rows.push(["reason", "is", $("reason").value]);
    return { text: $("text").value.trim(), kind: $("kind").value, verdict: $("verdict-filter").value, facts: rows };
  }

  /* Fill the menus, once all facts are loaded. */
  function menus() {
    const reasons = [...(facts.get("reason") ?? [])].sort();
    $("reason-label").hidden = !reasons.length || reasons.length > FEW;
    for (const reason of reasons) $("reason").append(new Option(written(String(reason)), reason));
    $("condition").disabled = !facts.size;
  }

  function labelled(tag, label) {
    const made = document.createElement(tag);
    made.setAttribute("aria-label", label);
    return made;
  }

  /* Add a condition: a fact, a comparison, a value. */
  function add() {
    const row = document.createElement("div");
    row.className = "condition";
    const name = labelled("select", "Fact");
    for (const fact of facts.keys()) name.append(new Option(written(fact), fact));
    const operation = labelled("select", "Comparison");
    for (const word of Object.keys(list.OPERATIONS)) operation.append(new Option(word));
    const wanted = labelled("input", "Value");
    wanted.setAttribute("list", "values");
    const away = labelled("button", "Remove this condition");
    away.type = "button";
    away.textContent = "×";
    row.append(name, operation, wanted, away);
    wanted.addEventListener("focus", () => {
      const values = [...(facts.get(name.value) ?? [])];
      $("values").replaceChildren(...(values.length > FEW ? [] : values.map((value) => new Option("", String(value)))));
    });
    wanted.addEventListener("input", soon);
    for (const one of [name, operation]) one.addEventListener("change", changed);
    away.addEventListener("click", () => {
      row.remove();
      changed();
    });
    $("conditions").append(row);
    name.focus();
  }

  function soon() {
    clearTimeout(waiting);
    waiting = setTimeout(changed, 150);
  }

  function clear() {
    for (const id of ["text", "kind", "verdict-filter", "reason"]) $(id).value = "";
    $("conditions").replaceChildren();
    changed();
  }

  kmineAudit.filter = { start, read, menus };
})();
