// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice The list from which the panels of one model are drawn.
struct List {
    address[] places; // zero: a hole
    uint40[] holes; // the places that are holes, in no order
    mapping(uint256 place => uint256) entryOf; // where in `holes` each of them stands
}

/// @title Places: a list that is joined and left at a fixed cost, with or without moving anybody
/// @notice What holds, whatever anyone does:
/// - the holes named are exactly the places that are zero;
/// - the list is never longer than the most members that it had at once: it grows only where it has no hole;
/// - nobody's place changes but by `shrink`, which the caller refuses itself while a draw counts on the places.
library Places {
    /// Seats a member: in a hole where there is one, else at the end.
    function join(List storage list, address member) internal returns (uint256 place) {
        uint256 count = list.holes.length;
        if (count == 0) {
            place = list.places.length;
            list.places.push(member);
        } else {
            place = list.holes[count - 1];
            list.holes.pop();
            delete list.entryOf[place];
            list.places[place] = member;
        }
    }

    /// Empties a member's place; nobody moves.
    function vacate(List storage list, uint256 place) internal {
        list.places[place] = address(0);
        list.entryOf[place] = list.holes.length;
        list.holes.push(uint40(place));
    }

    /// Takes a member's place out of the list: whoever is last moves there.
    /// @return moved Who sits at `place` now; zero when nobody moved there.
    function shrink(List storage list, uint256 place) internal returns (address moved) {
        uint256 end = list.places.length - 1;
        moved = list.places[end];
        list.places.pop();
        if (place == end) return address(0);
        list.places[place] = moved;
        if (moved != address(0)) return moved;
        uint256 entry = list.entryOf[end];
        delete list.entryOf[end];
        _name(list, entry, place);
    }

    /// Takes a hole out of the list in the same way.
    function fill(List storage list, uint256 place) internal returns (address moved) {
        uint256 last = list.holes.length - 1;
        uint256 entry = list.entryOf[place];
        uint256 other = list.holes[last];
        list.holes.pop();
        delete list.entryOf[place];
        if (entry != last) _name(list, entry, other);
        return shrink(list, place);
    }

    function _name(List storage list, uint256 entry, uint256 place) private {
        list.holes[entry] = uint40(place);
        list.entryOf[place] = entry;
    }
}
