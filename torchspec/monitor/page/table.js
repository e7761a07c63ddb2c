// A sortable table of many rows that change all the time: only cells whose text has changed are touched.

import { h, reconcile, say } from "./dom.js";
import { canvas, sparkline } from "./sparkline.js";

/**
 * columns: [{name, key (of its metric), value (row => what to sort by), show (row => text), title (row => a cell's),
 * numeric, badge (row => class), spark, values (row => [xs, values, floor])}]; last: row => whether it comes after others.
 */
export class Table {
  constructor(parent, { caption, scope, columns, key, sort, onSelect, last = () => false }) {
    Object.assign(this, { scope, columns, key, onSelect, last });
    this.sort = { column: columns.find((c) => c.name === sort.name), down: sort.down };
    this.rows = [];
    const heads = columns.map((column) => {
      const button = h(
        "button",
        { type: "button", on: { click: () => this.#sortBy(column) } },
        h("span", { text: column.name }),
        h("span", { class: "arrow", "aria-hidden": "true" }),
      );
      column.head = h(
        "th",
        { scope: "col", class: column.numeric ? "numeric" : "" },
        column.value ? button : column.name,
      );
      return column.head;
    });
    this.body = h("tbody");
    const table = h(
      "table",
      {},
      h("caption", { class: "hidden", text: caption }),
      h("thead", {}, h("tr", {}, ...heads)),
      this.body,
    );
    this.empty = h("p", { class: "nothing", text: "none yet" });
    parent.append(
      h("div", { class: "table-scroll panel", tabindex: 0, role: "region", "aria-label": caption }, table, this.empty),
    );
  }

  /** meaning: of metrics by scope and key, shown where one points at a column's head. */
  set(rows, meaning) {
    this.rows = rows;
    for (const { head, key } of this.columns) if (key) head.title = meaning.get(`${this.scope}.${key}`) ?? "";
    this.#draw();
  }

  #sortBy(column) {
    this.sort = { column, down: this.sort.column === column ? !this.sort.down : Boolean(column.numeric) };
    this.#draw();
  }

  #draw() {
    const { column, down } = this.sort;
    const sign = down ? -1 : 1;
    const order = (a, b) => this.last(a) - this.last(b) || sign * compare(column.value(a), column.value(b));
    const sorted = [...this.rows].sort(order);
    for (const { head, value, name } of this.columns) {
      if (!value) continue;
      const state = name === column.name ? (down ? "descending" : "ascending") : "none";
      if (head.getAttribute("aria-sort") !== state) head.setAttribute("aria-sort", state);
    }
    const elements = reconcile(this.body, sorted.map(this.key), (key) => this.#row(key));
    elements.forEach((element, i) => this.#fill(element, sorted[i]));
    this.empty.hidden = sorted.length > 0;
  }

  #row(key) {
    const cells = this.columns.map((column, i) => {
      if (column.spark) return h("td", {}, canvas(`spark spark-${column.spark}`));
      if (i === 0 && this.onSelect)
        return h(
          "th",
          { scope: "row" },
          h("button", { type: "button", class: "link", on: { click: () => this.onSelect(key) } }),
        );
      if (column.badge) return h("td", {}, h("span"));
      return i === 0 ? h("th", { scope: "row" }) : h("td", { class: column.numeric ? "numeric" : "" });
    });
    return h("tr", {}, ...cells);
  }

  #fill(element, row) {
    this.columns.forEach((column, i) => {
      const cell = element.children[i];
      if (column.spark) return sparkline(cell.firstChild, ...column.values(row));
      const place = cell.firstElementChild ?? cell;
      if (column.badge) place.className = column.badge(row);
      say(place, column.show(row));
      if (column.title) place.title = column.title(row);
    });
    if (this.onSelect) element.classList.toggle("selected", this.key(row) === this.selected);
  }
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return -1;
  if (b === null || b === undefined) return 1;
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}
