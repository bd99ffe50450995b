// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {EntryGate} from "./entry/EntryGate.sol";

/// @title StakeRegistry: who may offer, under which keys, and with what at stake
/// @notice A node has two keys. The operator is the hot key of a daemon: it publishes the node's roles and addresses and can never move
/// stake. The owner is the cold key: it alone takes stake out, and it is fixed at the first registration, so that a stolen hot key
/// cannot change it.
///
/// What holds, whatever anyone does:
/// - stake leaves only to the owner's choice after `unbondingDelay`, or by `slash`, and a slash takes no more than was locked before;
/// - stake that is unbonding can still be locked and slashed; locked stake cannot be withdrawn;
/// - only `disputes`, fixed at deployment, locks, unlocks and slashes; where it is zero nobody can;
/// - the events alone suffice to rebuild every field; nobody owns or upgrades this contract; a guardian may pause `stake` (see EntryGate) and nothing
/// else.
contract StakeRegistry is ReentrancyGuardTransient, EntryGate {
    using SafeERC20 for IERC20;

    /// @notice All that is known of a node. `stake` and `unbonding` are disjoint; `locked` is at most their sum.
    struct Node {
        address owner; // who may unbond and withdraw; zero for an operator that never registered
        uint8 roles; // bit mask of ROLE_*; zero when deregistered
        uint40 stakedSince; // unix seconds; amount-weighted mean of when `stake` came in, rounded up; zero without stake
        uint40 availableAt; // unix seconds from when `unbonding` may be withdrawn; zero while nothing unbonds
        uint96 stake; // base units that back the node's promises
        uint96 unbonding; // base units on their way out
        uint96 locked; // base units held by open disputes
        bytes32 tlsKeyHash; // SHA-256 of the server key that the node's endpoint presents
        string p2pId; // libp2p peer id, base58 text
        string endpoint; // host:port; empty when only reached through a relay
    }

    /// @notice Role bits.
    uint8 public constant ROLE_PROVIDER = 1;
    uint8 public constant ROLE_SCHEDULER = 2;
    uint8 public constant ROLE_VERIFIER = 4;

    /// @notice Longest texts that a node may publish, in bytes, so that reading a node stays cheap.
    uint256 public constant P2P_ID_BYTES_MAX = 128;
    uint256 public constant ENDPOINT_BYTES_MAX = 256;

    /// @notice The longest unbonding delay that a deployment may choose.
    uint40 public constant UNBONDING_DELAY_MAX = 365 days;

    uint8 private constant ROLES_ALL = ROLE_PROVIDER | ROLE_SCHEDULER | ROLE_VERIFIER;

    /// @notice The only address that may lock, unlock and slash; zero: nobody.
    address public immutable disputes;

    /// @notice Seconds between the last `beginUnbond` and `withdraw`; longer than the longest dispute.
    uint40 public immutable unbondingDelay;

    /// @notice Operators that an owner has agreed to stand behind before they name it.
    mapping(address owner => mapping(address operator => bool)) public approvedOperator;

    mapping(address operator => Node) private _nodes;

    event OperatorApproved(address indexed owner, address indexed operator, bool approved);
    event Registered(
        address indexed operator,
        address indexed owner,
        uint8 roles,
        string p2pId,
        bytes32 tlsKeyHash,
        string endpoint
    );
    event Deregistered(address indexed operator);
    /// @notice `stake` and `stakedSince` are the new values.
    event Staked(address indexed operator, address from, uint96 amount, uint96 stake, uint40 stakedSince);
    /// @notice `amount` moved from stake to unbonding; all that is unbonding is available at `availableAt`.
    event UnbondingStarted(address indexed operator, uint96 amount, uint40 availableAt);
    event Withdrawn(address indexed operator, address to, uint96 amount);
    /// @notice `locked` is the new value.
    event Locked(address indexed operator, uint96 amount, uint96 locked);
    /// @notice `locked` is the new value.
    event Unlocked(address indexed operator, uint96 amount, uint96 locked);
    /// @notice `amount` left the node and its lock; the last three are the new values.
    event Slashed(
        address indexed operator, address indexed to, uint96 amount, uint96 stake, uint96 unbonding, uint96 locked
    );

    /// @notice The unbonding delay is zero or longer than `UNBONDING_DELAY_MAX`.
    error InvalidUnbondingDelay(uint40 unbondingDelay);
    /// @notice No role, or one that does not exist.
    error InvalidRoles(uint8 roles);
    /// @notice The peer id is empty or longer than `P2P_ID_BYTES_MAX`.
    error InvalidP2PId(uint256 bytes_);
    /// @notice The endpoint is longer than `ENDPOINT_BYTES_MAX`.
    error InvalidEndpoint(uint256 bytes_);
    /// @notice The TLS key hash is zero: clients could not pin the server.
    error InvalidTlsKeyHash();
    /// @notice The owner is zero.
    error InvalidOwner();
    /// @notice This owner has not approved the operator: it calls `approveOperator` first.
    error OwnerNotApproving(address owner, address operator);
    /// @notice The node has an owner already; it never changes.
    error OwnerIsFixed(address owner);
    /// @notice The operator is not registered.
    error NotRegistered(address operator);
    /// @notice The caller is not the node's owner.
    error NotOwner(address operator, address caller);
    /// @notice The caller is not the disputes contract.
    error NotDisputes(address caller);
    /// @notice The amount is zero.
    error ZeroAmount();
    /// @notice The amount is more than there is.
    error InsufficientStake(address operator, uint96 amount, uint256 available);
    /// @notice Nothing is unbonding.
    error NothingUnbonding(address operator);
    /// @notice The unbonding stake may be withdrawn only from `availableAt` on.
    error StillUnbonding(address operator, uint40 availableAt);
    /// @notice Open disputes hold all that is left.
    error StakeLocked(address operator, uint96 locked);
    /// @notice The recipient is zero or this contract.
    error InvalidRecipient(address to);

    modifier onlyDisputes() {
        if (msg.sender != disputes) revert NotDisputes(msg.sender);
        _;
    }

    /// @param token_ The ERC-20 that is staked: exact transfers only, no rebasing.
    /// @param disputes_ Who may lock and slash; zero for nobody.
    /// @param unbondingDelay_ Seconds, 1 to `UNBONDING_DELAY_MAX`.
    /// @param guardian_ Who may pause `stake`; zero for nobody.
    /// @param stakeMax_ The most that one node may hold, bonded and unbonding, base units; zero for no limit.
    /// @param totalMax_ The most that this contract may hold, base units; zero for no limit.
    constructor(
        IERC20 token_,
        address disputes_,
        uint40 unbondingDelay_,
        address guardian_,
        uint96 stakeMax_,
        uint256 totalMax_
    ) EntryGate(token_, guardian_, stakeMax_, totalMax_) {
        if (unbondingDelay_ == 0 || unbondingDelay_ > UNBONDING_DELAY_MAX) {
            revert InvalidUnbondingDelay(unbondingDelay_);
        }
        disputes = disputes_;
        unbondingDelay = unbondingDelay_;
    }

    // ------------------------------------------------------------------ identity

    /// @notice The caller registers itself as an operator, or updates what it published. Its owner is the caller itself the first time
    /// and whoever it was from then on.
    function register(uint8 roles, string calldata p2pId, bytes32 tlsKeyHash, string calldata endpoint) external {
        address owner = _nodes[msg.sender].owner;
        _register(owner == address(0) ? msg.sender : owner, roles, p2pId, tlsKeyHash, endpoint);
    }

    /// @notice The same, naming a cold key as the owner. The owner must have called `approveOperator` (else anyone could bind a stranger to a
    /// node and so shut it out of that node's disputes), and an owner once set stays.
    function registerWithOwner(
        address owner,
        uint8 roles,
        string calldata p2pId,
        bytes32 tlsKeyHash,
        string calldata endpoint
    ) external {
        if (owner == address(0)) revert InvalidOwner();
        address current = _nodes[msg.sender].owner;
        if (current != address(0) && current != owner) revert OwnerIsFixed(current);
        if (current == address(0) && owner != msg.sender && !approvedOperator[owner][msg.sender]) {
            revert OwnerNotApproving(owner, msg.sender);
        }
        _register(owner, roles, p2pId, tlsKeyHash, endpoint);
    }

    /// @notice The caller agrees, or no longer agrees, to be named as the owner of `operator`; nodes already registered keep their owner.
    function approveOperator(address operator, bool approved) external {
        approvedOperator[msg.sender][operator] = approved;
        emit OperatorApproved(msg.sender, operator, approved);
    }

    /// @notice The calling operator stops offering. Owner and stake stay; the owner unbonds when it likes.
    function deregister() external {
        Node storage node_ = _nodes[msg.sender];
        if (node_.roles == 0) revert NotRegistered(msg.sender);
        node_.roles = 0;
        node_.tlsKeyHash = 0;
        delete node_.p2pId;
        delete node_.endpoint;
        emit Deregistered(msg.sender);
    }

    // ------------------------------------------------------------------ stake

    /// @notice Adds the caller's tokens to a registered node's stake. They become the owner's: this is no loan.
    /// @dev `stakedSince` moves towards now by the amount's share, rounded up, so that fresh stake never looks seasoned and a stranger's
    /// dust costs a node's seniority one second at most.
    function stake(address operator, uint96 amount) external nonReentrant whileEntryIsOpen {
        Node storage node_ = _nodes[operator];
        if (node_.roles == 0) revert NotRegistered(operator);
        if (amount == 0) revert ZeroAmount();
        (uint96 before, uint40 since) = (node_.stake, node_.stakedSince);
        uint96 total = before + amount;
        since += uint40(Math.mulDiv(block.timestamp - since, amount, total, Math.Rounding.Ceil));
        (node_.stake, node_.stakedSince) = (total, since);
        emit Staked(operator, msg.sender, amount, total, since);
        _takeIn(amount, uint256(total) + node_.unbonding);
    }

    /// @notice The owner starts taking `amount` out. The delay counts anew for all that is unbonding.
    function beginUnbond(address operator, uint96 amount) external {
        Node storage node_ = _ownersNode(operator);
        if (amount == 0) revert ZeroAmount();
        uint96 before = node_.stake;
        if (amount > before) revert InsufficientStake(operator, amount, before);
        uint40 availableAt = uint40(block.timestamp) + unbondingDelay;
        node_.stake = before - amount;
        if (amount == before) node_.stakedSince = 0;
        node_.unbonding += amount;
        node_.availableAt = availableAt;
        emit UnbondingStarted(operator, amount, availableAt);
    }

    /// @notice Pays the owner what has finished unbonding and is not held by a dispute.
    function withdraw(address operator) external nonReentrant {
        Node storage node_ = _ownersNode(operator);
        (uint96 unbonding, uint40 availableAt) = (node_.unbonding, node_.availableAt);
        if (unbonding == 0) revert NothingUnbonding(operator);
        if (block.timestamp < availableAt) revert StillUnbonding(operator, availableAt);
        uint96 amount = uint96(Math.min(unbonding, lockable(operator)));
        if (amount == 0) revert StakeLocked(operator, node_.locked);
        node_.unbonding = unbonding - amount;
        if (amount == unbonding) node_.availableAt = 0;
        emit Withdrawn(operator, msg.sender, amount);
        token.safeTransfer(msg.sender, amount);
    }

    // ------------------------------------------------------------------ disputes

    /// @notice Holds `amount` of a node's stake, bonded or unbonding, against withdrawal.
    function lock(address operator, uint96 amount) external onlyDisputes {
        if (amount == 0) revert ZeroAmount();
        uint256 available = lockable(operator);
        if (amount > available) revert InsufficientStake(operator, amount, available);
        uint96 locked = _nodes[operator].locked + amount;
        _nodes[operator].locked = locked;
        emit Locked(operator, amount, locked);
    }

    /// @notice Releases `amount` of what is locked.
    function unlock(address operator, uint96 amount) external onlyDisputes {
        uint96 locked = _spendLock(operator, amount);
        emit Unlocked(operator, amount, locked);
    }

    /// @notice Takes `amount` of what is locked from the node, bonded stake first, and pays it to `to`.
    function slash(address operator, uint96 amount, address to) external onlyDisputes nonReentrant {
        if (to == address(0) || to == address(this)) revert InvalidRecipient(to);
        uint96 locked = _spendLock(operator, amount);
        Node storage node_ = _nodes[operator];
        (uint96 bonded, uint96 unbonding) = (node_.stake, node_.unbonding);
        uint96 fromBonded = amount < bonded ? amount : bonded;
        bonded -= fromBonded;
        unbonding -= amount - fromBonded;
        (node_.stake, node_.unbonding) = (bonded, unbonding);
        if (bonded == 0) node_.stakedSince = 0;
        if (unbonding == 0) node_.availableAt = 0;
        emit Slashed(operator, to, amount, bonded, unbonding, locked);
        token.safeTransfer(to, amount);
    }

    // ------------------------------------------------------------------ views

    /// @notice All that is known of a node; all zero for an address that never registered.
    function node(address operator) external view returns (Node memory) {
        return _nodes[operator];
    }

    /// @notice Owner and roles of a node, in one read: zero for an address that never registered.
    function identity(address operator) external view returns (address owner, uint8 roles) {
        Node storage node_ = _nodes[operator];
        return (node_.owner, node_.roles);
    }

    /// @notice Base units of a node, bonded or unbonding, that no dispute holds.
    function lockable(address operator) public view returns (uint256) {
        Node storage node_ = _nodes[operator];
        return uint256(node_.stake) + node_.unbonding - node_.locked;
    }

    // ------------------------------------------------------------------ private

    function _register(
        address owner,
        uint8 roles,
        string calldata p2pId,
        bytes32 tlsKeyHash,
        string calldata endpoint
    ) private {
        if (roles == 0 || roles & ~ROLES_ALL != 0) revert InvalidRoles(roles);
        uint256 idBytes = bytes(p2pId).length;
        if (idBytes == 0 || idBytes > P2P_ID_BYTES_MAX) revert InvalidP2PId(idBytes);
        if (bytes(endpoint).length > ENDPOINT_BYTES_MAX) revert InvalidEndpoint(bytes(endpoint).length);
        if (tlsKeyHash == 0) revert InvalidTlsKeyHash();
        Node storage node_ = _nodes[msg.sender];
        (node_.owner, node_.roles, node_.tlsKeyHash) = (owner, roles, tlsKeyHash);
        (node_.p2pId, node_.endpoint) = (p2pId, endpoint);
        emit Registered(msg.sender, owner, roles, p2pId, tlsKeyHash, endpoint);
    }

    function _ownersNode(address operator) private view returns (Node storage node_) {
        node_ = _nodes[operator];
        if (node_.owner == address(0)) revert NotRegistered(operator);
        if (node_.owner != msg.sender) revert NotOwner(operator, msg.sender);
    }

    function _spendLock(address operator, uint96 amount) private returns (uint96 locked) {
        if (amount == 0) revert ZeroAmount();
        locked = _nodes[operator].locked;
        if (amount > locked) revert InsufficientStake(operator, amount, locked);
        locked -= amount;
        _nodes[operator].locked = locked;
    }
}
